"""The package as others import it: light, and without the optional libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import sepme

BLOCKED = ("triton", "diffusers", "transformers", "matplotlib", "jinja2", "typer", "rich", "PIL", "yaml")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_none_of_the_optional_libraries() -> None:
    """With every one of them missing, the library imports and plans."""
    python(
        "import sys\n"
        f"for name in {BLOCKED!r}: sys.modules[name] = None\n"
        "import sepme, torch\n"
        "from sepme.plan.directions import null_basis\n"
        "assert null_basis(torch.eye(3)[:1], 1e-6).shape == (3, 2)\n"
    )


def test_import_pulls_in_nothing_beyond_torch_and_safetensors() -> None:
    """What ``import sepme`` adds to ``import torch`` is its own modules, safetensors and the standard library."""
    added = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import sepme\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))\n"
    ).split()
    assert set(added) <= {"sepme", "safetensors", "__editable___comfyui_sepme_0_1_0_finder", "torch", "packaging"}


def test_host_names_are_not_shadowed() -> None:
    """``nodes`` belongs to ComfyUI and ``kernels`` to another package: an installed SepME must not answer to either."""
    python(
        "import importlib.util, os, sys, sepme\n"
        "sys.path[:] = [p for p in sys.path if p not in ('', os.getcwd())]\n"
        "found = [importlib.util.find_spec(n) for n in ('nodes', 'kernels')]\n"
        "root = os.path.dirname(os.path.dirname(sepme.__file__))\n"
        "assert not [s for s in found if s and s.origin and s.origin.startswith(root)], found\n"
        "import sepme_kernels\n"
    )


def test_rooms_import_in_one_direction() -> None:
    """The folders of the library have an order; training knows nothing of the run time, and nobody needs the commands or the demo."""
    root = Path(sepme.__file__).parent
    rooms: dict[str, set[str]] = {}
    for file in root.glob("*/*.py"):
        room = file.parent.name
        found = (n.module for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom) and n.level == 2)
        others = {module.split(".")[0] for module in found if module}
        rooms.setdefault(room, set()).update(o for o in others if (root / o).is_dir() and o != room)
    TopologicalSorter(rooms).prepare()  # raises CycleError
    assert not rooms["train"] & {"apply", "convert", "evaluate", "hosts"}
    assert not [room for room, needs in rooms.items() if needs & {"cli", "demo"} and room != "cli"]
