"""Real ComfyUI servers, and one ComfyUI inside the process, for all tests of a worker."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui import inside as comfyui_inside
from comfyui.checkpoint import save_checkpoint
from comfyui.server import ROOT, Server, serving

NAME = "models of mine/sd15.safetensors"
CORPUS = 24  # ordinary prompts that calibrate gates there: a CPU encodes few a second
LESS = {  # words near a concept, and denoising steps of what training reads, likewise
    "train/erasures.py": ("\nNEARBY = 100 ", "\nNEARBY = 8 "),
    "plan/nearby.py": ("\nCOUNT = 200 ", "\nCOUNT = 8 "),
    "model/schedule.py": ("\nTRAJECTORY = Sampling(25, ", "\nTRAJECTORY = Sampling(4, "),
}


def lessened_pack(base: Path) -> Path:
    """A copy of the pack as the registry's zip holds it, that calibrates on less."""
    pack = base / "comfyui-sepme"
    lines = [line for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(line.startswith("/") for line in lines)  # or web/docs would go with docs
    left_out = {line.strip("/") for line in lines} | {"demo", "build", "runs"}  # the zip's, and what lies about in a checkout
    others = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")

    def ignore(folder: str, names: list[str]) -> set[str]:
        return ({n for n in names if n in left_out} if Path(folder) == ROOT else set()) | others(folder, names)

    shutil.copytree(ROOT, pack, ignore=ignore)
    corpus = pack / "sepme" / "data" / "ordinary_prompts.txt"
    corpus.write_text("\n".join(corpus.read_text(encoding="utf-8").splitlines()[:CORPUS]), encoding="utf-8")
    for name, (much, less) in LESS.items():
        code = (pack / "sepme" / name).read_text(encoding="utf-8")
        assert code.count(much) == 1
        (pack / "sepme" / name).write_text(code.replace(much, less), encoding="utf-8")
    return pack


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("comfyui"), pack=lessened_pack(tmp_path_factory.mktemp("pack"))) as running:
        yield running


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> None:
    """ComfyUI's modules and this checkout as its node pack, without a model."""
    comfyui_inside.start(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def inside(comfy: None) -> comfyui_inside.Inside:
    return comfyui_inside.Inside()


@pytest.fixture(scope="session")
def checkpoint_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has neither triton nor diffusers; a checkpoint in SD1.5's layout, and a loader of other families' models."""
    base, pack = tmp_path_factory.mktemp("sd15"), lessened_pack(tmp_path_factory.mktemp("pack"))
    words = pack / "sepme" / "data" / "broader_words.txt"
    words.write_text("a picture, a painting: van gogh, picasso, monet\nan animal, a picture: dog, cat, horse\n", encoding="utf-8")
    path = base / "models" / "checkpoints" / NAME
    path.parent.mkdir(parents=True)
    save_checkpoint("sd1", path)
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).parent / "tiny_families.py", base / "custom_nodes")
    with serving(base, pack=pack, without=("triton", "diffusers")) as running:
        yield running
