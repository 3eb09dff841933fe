"""Where the real hosts are, if any: ``SEPME_WEBUI`` names checkouts of Automatic1111, Forge or their kin, ``SEPME_WEBUI_EXTENSIONS``
such of other extensions, separated like PATH."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).parent / "host"
CHECKOUTS, EXTENSIONS = (
    [Path(p) for p in os.environ.get(name, "").split(os.pathsep) if p] for name in ("SEPME_WEBUI", "SEPME_WEBUI_EXTENSIONS")
)

collect_ignore = [] if find_spec("gradio") else ["inside"]  # those run in environments of their own: test_in_gradio.py
