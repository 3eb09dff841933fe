"""Who may know what: hosts' modules are imported in their own rooms alone, and names of layers stand in the families' files alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMFYUI = {"comfy", "comfy_extras", "execution", "folder_paths", "latent_preview", "server"}  # comfy_api is for nodes
CODE = ("sepme", "nodes", "scripts", "kernels")


def files(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Paths below the root with forward slashes, and what they hold."""
    for path in (p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Top-level packages of absolute imports, those inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def texts(tree: ast.Module) -> Iterator[str]:
    """Strings that are no docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings)


def test_only_the_host_rooms_know_a_host() -> None:
    known: dict[str, set[str]] = {"comfyui": set(), "webui": set()}
    for name, tree in files(*CODE):
        for host, packages in (("comfyui", COMFYUI), ("webui", {"modules", "modules_forge"})):
            if imported(tree) & packages:
                known[host].add(name.rpartition("/")[0])
    assert known == {"comfyui": {"nodes/host"}, "webui": {"scripts/webui/host"}}


def test_only_families_know_names_of_layers() -> None:
    """Loaders of whole models and benchmarks of a given model aside."""
    found = {name for name, tree in files(*CODE) for text in texts(tree) if "attn2" in text or "transformer_blocks" in text}
    assert {name.rpartition("/")[0] for name in found} == {"sepme/model/families", "sepme/hosts", "sepme/bench"}
