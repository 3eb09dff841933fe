"""Environments with the gradio of each WebUI inside the one that runs the tests: they share its PyTorch, and nothing is changed in it.

``python tests/webui/environments.py`` makes them; the tests do it when they are missing or their list has changed.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

LISTS = {name: Path(__file__).parent / "gradio" / f"{name}.txt" for name in ("3", "4")}


def environment(gradio: str) -> Path:
    """The Python of an environment, made if need be; one process at a time.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    folder = Path(sys.prefix) / f"webui-gradio{gradio}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready, wanted = folder / "ready.txt", LISTS[gradio].read_text(encoding="utf-8")
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    with _locked(Path(sys.prefix) / f"webui-gradio{gradio}.lock"):
        if not (ready.exists() and ready.read_text(encoding="utf-8") == wanted):
            venv.create(folder, clear=True, symlinks=sys.platform != "win32")
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "-r", str(LISTS[gradio])], check=True)
            inner = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
            (inner / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")  # after its own packages
            ready.write_text(wanted, encoding="utf-8")
    return python


def _locked(path: Path):  # type: ignore[no-untyped-def]
    from filelock import FileLock  # torch brings it

    return FileLock(path, timeout=600)


if __name__ == "__main__":
    for name in LISTS:
        print(environment(name))
