"""Three kills of training, in a process of their own; ``python tests/demo/kill.py --times 100`` for more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_killed_training_leaves_nothing_broken_and_resumes() -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), "--times", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert " killed\n" in done.stdout
    assert "resumed to the same bytes: gcirs" in done.stdout
