"""A new objective is two files: one of its own and a line in the registry. The CLI, the node and the tab of a copy of the tree have it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfyui.environment import comfyui
from safetensors import safe_open
from webui.environments import environment

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "trained to grey"
FILE = f'''"""Predicts nothing."""

from torch import Tensor

from .objective import Objective, Step


class Grey(Objective):
    name, summary = "grey", "{SUMMARY}"

    def loss(self, step: Step) -> Tensor:
        return step.erased(step.own).square().mean()
'''
NODE = """
import importlib, importlib.util, json, sys
sys.argv = ["main.py", "--cpu", "--base-directory", sys.argv[2]]
import comfy.options
comfy.options.enable_args_parsing()
spec = importlib.util.spec_from_file_location("pack", f"{ROOT}/__init__.py", submodule_search_locations=[ROOT])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
inputs = importlib.import_module("pack.nodes.train").SepMETrain.define_schema().inputs
print(json.dumps(next([list(i.options), i.tooltip] for i in inputs if i.id == "objective")))
"""
TAB = """
import json, sys
from pathlib import Path
sys.path.insert(0, f"{ROOT}/tests/webui/host")
import modules.paths, modules.script_callbacks, modules.scripts
modules.paths.models_path = sys.argv[2]
modules.scripts.load_scripts(Path(ROOT, "scripts"))
pages = [page for callback in modules.script_callbacks.callbacks["ui_tabs"] for page, *_ in callback()]
boxes = [b for page in pages for b in page.blocks.values() if getattr(b, "elem_id", None) == "sepme_objective"]
print(json.dumps([[c[-1] if isinstance(c, (tuple, list)) else c for c in boxes[0].choices], boxes[0].info]))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with the two files."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("sepme", "kernels", "nodes", "scripts", "locales", "tests/webui/host"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", root)
    folder = root / "sepme/train/objectives"
    (folder / "grey.py").write_text(FILE, encoding="utf-8")
    registry = (folder / "__init__.py").read_text(encoding="utf-8")
    changed = registry.replace("ClosedForm)", "ClosedForm, Grey)")
    assert changed != registry
    changed = changed.replace("from .objective import", "from .grey import Grey\nfrom .objective import")
    (folder / "__init__.py").write_text(changed, encoding="utf-8")
    return root


def run(copy: Path, *command: object, **variables: str) -> str:
    """What a command prints that is run in an empty folder inside the copy, so that no other tree is found by where it runs."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"GRADIO_ANALYTICS_ENABLED": "False"} | variables
    (copy / "base").mkdir(exist_ok=True)
    done = subprocess.run(list(map(str, command)), env=environ, cwd=copy / "base", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def offered(python: object, script: str, copy: Path, *path: Path) -> Any:
    """What a menu shows: its choices and its text."""
    code = f"import sys\nROOT = sys.argv[1]\n{script}"
    given = {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return json.loads(run(copy, python, "-c", code, copy, copy / "base", **given).splitlines()[-1])


def test_command_line(copy: Path, tmp_path: Path) -> None:
    """It is in the help, and trains: the file says what made it."""
    (tmp_path / "book.yaml").write_text("[star]", encoding="utf-8")
    command, given = [sys.executable, "-m", "sepme.cli", "train"], {"PYTHONPATH": str(copy), "COLUMNS": "200"}
    assert f"grey: {SUMMARY}." in " ".join(run(copy, *command, "--help", **given).split())
    options = ["--objective", "grey", "--steps", "1", "--batch", "1", "--nearby", "0", "--no-thumbnail", "-o", tmp_path / "out"]
    run(copy, *command, "demo", tmp_path / "book.yaml", *options, **given)
    with safe_open(tmp_path / "out" / "star.safetensors", framework="pt") as file:
        objective = json.loads(file.metadata()["objective"])
    assert objective["name"] == "grey"
    assert objective["steps"] == 1
    assert objective["warm_start"] is False


def test_node(copy: Path) -> None:
    choices, tooltip = offered(sys.executable, NODE, copy, comfyui())
    assert choices == ["gcirs", "esd", "sdd", "ablation", "fmn", "closed-form", "grey"]
    assert f"grey: {SUMMARY}." in tooltip


def test_tab(copy: Path) -> None:
    choices, info = offered(environment("4"), TAB, copy)
    assert choices == ["gcirs", "esd", "sdd", "ablation", "fmn", "closed-form", "grey"]
    assert f"grey: {SUMMARY}." in info
