"""The real code of sd-webui-negpip, loaded with the hosts' modules stood in for."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PART = "(ugly:-1.0)"  # of a prompt: what makes it do something


def load(checkout: Path) -> Any:
    """Its script module; its ``Script`` is what the host calls."""
    import modules
    import modules.script_callbacks
    import modules.shared

    config = Path(tempfile.mkdtemp()) / "ui-config.json"
    config.write_text("{}")
    modules.shared.cmd_opts.ui_config_file = str(config)
    ui = ModuleType("modules.ui")
    ui.versions_html = lambda: "version: 1.10.1"  # type: ignore[attr-defined]
    sys.modules["modules.ui"] = modules.ui = ui  # type: ignore[attr-defined]
    sys.modules["gradio"] = SimpleNamespace(Checkbox=object, __version__="3.41.2")  # type: ignore[assignment]
    modules.script_callbacks.on_ui_settings = lambda callback: None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("negpip_script", checkout / "scripts" / "negpip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
