"""A thousand hostile inputs, in a process with bounded memory; ``python tests/fuzz.py --cases 100000`` for more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_hostile_input_is_refused_in_one_line_or_valid() -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "fuzz.py"), "--cases", "1000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(f"{kind} refused" in done.stdout for kind in ("delta", "book", "toggles", "tags")), done.stdout
