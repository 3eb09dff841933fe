"""The extension as a host loads it: by path, with the host's modules importable. ``kind`` is the host."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from webui.conftest import ROOT, STUBS

sys.path.insert(0, str(STUBS))

import modules.devices
import modules.extra_networks
import modules.paths
import modules.processing
import modules.script_callbacks
import modules.scripts
import modules.shared
import modules.toy
import modules.xyz_grid

from .page import build

CONCEPTS = ("star", "heart", "moon")


class Library:
    """Import hook: the extension is imported afresh by every :class:`WebUI`, the library and kernels in it, which know no host, once."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}

    def remember(self) -> None:
        names = [n for n in sys.modules if n.startswith(("sepme_extension.sepme", "sepme_extension.kernels"))]
        self.modules |= {n: sys.modules[n] for n in names}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = self.modules.get(name)
        return spec_from_loader(name, self, is_package=hasattr(found, "__path__")) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        sys.modules.update(self.modules)  # what a module imports comes with it
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has been."""


sys.meta_path.insert(0, library := Library())  # type: ignore[arg-type]


def make(prompt: str | list[str], **more: Any) -> Any:
    """The host's processing object, of img2img where there are ``init_images``; what is no field of it is set as others would."""
    kind = "Img2Img" if "init_images" in more else "Txt2Img"
    made = getattr(modules.processing, f"StableDiffusionProcessing{kind}")
    fields = {f.name for f in dataclasses.fields(made) if f.init}
    p = made(prompt=prompt, **({"seed": 0, "steps": 3} | {k: v for k, v in more.items() if k in fields}))
    for name in more.keys() - fields:
        setattr(p, name, more[name])
    return p


class WebUI:
    """A host with the extension in it."""

    def __init__(self, kind: str, models: Path) -> None:
        modules.shared.kind, modules.paths.models_path = kind, str(models)
        vars(modules.shared.opts).update(modules.shared.DEFAULTS)
        modules.shared.state.__init__()  # type: ignore[misc]
        modules.extra_networks.extra_network_registry.clear()
        modules.toy.UnetPatcher.loaded = None
        modules.shared.sd_model = modules.toy.Checkpoint()
        self.kind, self.folder = kind, models / "sepme"
        library.remember()
        modules.scripts.load_scripts(ROOT / "scripts")
        self.grid = SimpleNamespace(axis_options=[], AxisOption=modules.xyz_grid.AxisOption)
        modules.scripts.scripts_data.append(modules.scripts.ScriptClassData(type("Grid", (), {}), "xyz_grid.py", "", self.grid))
        for callback in modules.script_callbacks.callbacks["before_ui"]:
            callback()
        modules.scripts.scripts_data.pop()
        self.runner = modules.scripts.ScriptRunner()
        self.last: Any = None

    @property
    def model(self) -> Any:
        return modules.shared.sd_model

    def part(self, name: str) -> Any:
        """A module of the extension."""
        return sys.modules[f"sepme_extension.{name}"]

    def planner(self, model: Any, book: Any) -> Any:
        """Gates calibrated on every eighth pair of ordinary prompts, which is enough for a toy."""
        ordinary = self.part("sepme.plan.gate").ordinary_prompts()
        return self.part("sepme.plan.planner").Planner(model, book, ordinary=[p for i, p in enumerate(ordinary) if i // 2 % 8 == 0])

    def draw(self, prompt: str | list[str] = "a star", *args: Any, script: bool = True, **more: Any) -> torch.Tensor:
        """Latents; ``args`` are the extension's own."""
        p = make(prompt, **more)
        p.scripts, p.script_args = (self.runner if script else None), args or (False, [], "", True, "auto")
        latents, self.infotexts = modules.processing.process_images(p)
        self.last = p
        return latents

    def erase(
        self, *concepts: str, prompt: str | list[str] = "a star", strengths: str = "", gate: bool = True, **more: Any
    ) -> torch.Tensor:
        """Latents with concepts chosen in the panel."""
        return self.draw(prompt, True, list(concepts), strengths, gate, "auto", **more)


@pytest.fixture(params=["a1111", "forge"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def make_webui() -> Callable[..., WebUI]:
    return WebUI


@pytest.fixture(scope="session")
def delta_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with deltas of the toy checkpoint, solved in closed form by the extension's own model adapter."""
    models = tmp_path_factory.mktemp("models")
    ui = WebUI("a1111", models)
    book = ui.part("sepme.concepts").ConceptBook.loads("\n".join(f"- {name}" for name in CONCEPTS).replace("- ", "concepts:\n- ", 1))
    train, host = ui.part("sepme.train"), ui.part("scripts.webui.host")
    with host.loaded_model() as model:
        planner = ui.planner(model, book)
        for name in CONCEPTS:
            delta = train.make_delta(planner, name, model, train.TrainOptions.for_mode(objective="closed-form"))
            host.library.save(delta)
    return models


@pytest.fixture(scope="module")
def page(make_webui: Callable[..., WebUI], delta_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page on a real gradio server: ``ui``, ``url``, and the folder ``models``."""
    models = tmp_path_factory.mktemp("page")
    shutil.copytree(delta_files / "sepme", models / "sepme")
    ui = make_webui("a1111", models)
    blocks = build(ui)
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_api=True)
    yield SimpleNamespace(ui=ui, url=url, models=models)
    blocks.close(verbose=False)


@pytest.fixture
def webui(kind: str, delta_files: Path) -> Iterator[WebUI]:
    ui = WebUI(kind, delta_files)
    yield ui
    ui.part("scripts.webui.generation").release()
