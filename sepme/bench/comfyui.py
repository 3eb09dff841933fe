"""Overhead and toggling inside a real ComfyUI: a process of its own that runs ``benchmarks/comfyui.py`` of the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import SepMEError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "comfyui.py"


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job (see the script) in the ComfyUI of ``folder``, with this Python.

    Raises:
        SepMEError: no ComfyUI there, no checkout with the script, or the run failed.
    """
    if not (folder / "main.py").is_file():
        raise SepMEError(f"{folder} holds no ComfyUI (main.py is missing); give the folder of a checkout.")
    if not SCRIPT.is_file():
        raise SepMEError("Measuring in ComfyUI needs a checkout of this project, not the installed package; run it from there.")
    arguments = json.dumps(job | {"comfyui": str(folder.resolve()), "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, str(SCRIPT), arguments], capture_output=True, text=True)
    if done.returncode:
        raise SepMEError(f"The run in ComfyUI failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
