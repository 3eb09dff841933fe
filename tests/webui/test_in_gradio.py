"""Runs ``inside/`` with each gradio that the hosts pin: 4.40 (Forge, Forge Neo), and what has a page with 3.41 (Automatic1111, reForge)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from webui.conftest import ROOT
from webui.environments import LISTS, environment


@pytest.mark.parametrize("gradio", [pytest.param(name, marks=pytest.mark.xdist_group(f"gradio {name}")) for name in reversed(LISTS)])
def test_inside(gradio: str) -> None:
    inside = Path(__file__).parent / "inside"
    python, tests = environment(gradio), [inside / f"test_{name}.py" for name in ("page", "api", "browser")] if gradio == "3" else [inside]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables |= {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)]
    result = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=500)
    print(result.stdout[-6000:], result.stderr[-2000:])
    assert result.returncode == 0
