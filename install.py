"""Install hook of both hosts: installs what requirements.txt lists and is missing, without dependencies, so never torch.

Automatic1111 and Forge run this file at every start, with their ``launch`` importable; ComfyUI-Manager runs it after an
installation, with plain Python. It may run any number of times, and without a network it says what is missing and lets the host start.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
PIP = ("install", "--no-deps", "--retries", "1", "--timeout", "10")


def missing(requirements: Path = REQUIREMENTS) -> list[str]:
    """Lines ``name>=version`` of a requirements file that this environment does not meet."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not _met(*line.split(">="))]


def _met(name: str, least: str) -> bool:
    try:
        return _release(metadata.version(name)) >= _release(least)
    except metadata.PackageNotFoundError:
        return False


def _release(version: str) -> tuple[int, ...]:
    """``1.26.4rc1`` -> ``(1, 26, 4)``, without zeros at the end."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    numbers = [int(n) for n in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def install(wanted: list[str]) -> None:
    """Install by the host's own launcher where there is one, so that its index and its --skip-install count; else by pip.

    Raises:
        RuntimeError, OSError, subprocess.CalledProcessError: pip failed.
    """
    try:
        from launch import run_pip  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        subprocess.run([sys.executable, "-m", "pip", *PIP, *wanted], check=True)
    else:
        run_pip(" ".join([*PIP, *(f'"{line}"' for line in wanted)]), f"{', '.join(wanted)} for SepME")


def main() -> int:
    wanted = missing()
    if not wanted:
        return 0
    with contextlib.suppress(RuntimeError, OSError, subprocess.CalledProcessError):  # what is missing then is said below
        install(wanted)
    importlib.invalidate_caches()
    wanted = missing()
    if wanted:
        commands = " ".join(f'"{line}"' for line in wanted)
        print(f"SepME lacks {', '.join(wanted)} (no network?); run, in the host's environment: python -m pip install {commands}")
    return 0  # a missing package must not keep the host from starting


if __name__ == "__main__":
    sys.exit(main())
