"""ComfyUI inside the test process, with this checkout as its custom node, for what HTTP does not show."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfyui.environment import comfyui
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PACK = "sepme_pack"
PRESERVED = ("a red church", "a tulip in the city")  # prompts that must not change


def start(base: Path) -> None:
    """Make ``comfy`` importable, on the CPU, and load the checkout as the package :data:`PACK`, as ComfyUI would."""
    sys.path[:0] = [str(comfyui()), *filter(None, os.environ.get("SEPME_COMFYUI_PACKAGES", "").split(os.pathsep))]
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args

        importlib.import_module("utils.extra_config")  # as main.py does, before ComfyUI's nodes put another 'utils' on the path
    finally:
        sys.argv = argv
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])
    with torch.inference_mode():
        importlib.import_module(f"{PACK}.nodes")


class Inside:
    """The embedded model in ComfyUI, two closed-form deltas of it, and one call to sample."""

    def __init__(self) -> None:
        self.pack = sys.modules[PACK]
        self.host = importlib.import_module(f"{PACK}.nodes.host")
        self.sepme = importlib.import_module(f"{PACK}.sepme")
        with torch.inference_mode():
            self.model, self.clip, self.vae = self.host.demo_model()
            self.deltas = self.make(("star", "openmoji"))

    def make(self, names: Sequence[str]) -> tuple[Any, ...]:
        """Deltas in closed form; the corpus of ordinary prompts is a short one."""
        book = self.sepme.ConceptBook(tuple(self.sepme.Concept(n, (n, f"a {n}", f"a {n} picture")) for n in names), PRESERVED)
        ordinary = ("a red church", "a blue tulip", "a picture on a table", "green", "an airplane in the city", "high quality")
        planner = self.sepme.Planner(self.host.ClipEncoder(self.clip), book, ordinary=ordinary)
        denoiser = self.host.UNetDenoiser(self.model)
        options = self.sepme.TrainOptions.for_mode(objective="closed-form")
        return tuple(self.sepme.make_delta(planner, n, denoiser, options) for n in names)

    def text(self, prompt: str, **facts: Any) -> list[Any]:
        """CONDITIONING of a prompt, as CLIPTextEncode makes it."""
        with torch.inference_mode():
            return [[c, {**d, **facts}] for c, d in self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))]

    def toggled(self, prompt: str, toggles: dict[str, float], **facts: Any) -> list[Any]:
        return self.host.toggled(self.text(prompt, **facts), toggles)

    def apply(self, model: Any, toggles: dict[str, float] | None = None, **options: Any) -> Any:
        return self.host.apply_deltas(model, self.deltas, toggles or {}, **options)

    def sample(
        self, model: Any, positive: list[Any], negative: list[Any] | None = None, *, batch: int = 1, steps: int = 3, cfg: float = 3.0,
        seed: int = 5,
    ) -> Tensor:  # fmt: skip
        """Latents ``(batch, 4, 8, 8)``, by ComfyUI's own sampler."""
        import comfy.sample

        with torch.inference_mode():
            start = torch.zeros(batch, 4, 8, 8)
            noise = comfy.sample.prepare_noise(start, seed)
            negative = self.text("") if negative is None else negative
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "normal", positive, negative, start, disable_pbar=True, seed=seed
            ).clone()

    def merged(self, model: Any, strengths: Sequence[float]) -> Any:
        """The MODEL with ``W + Σ s ΔW`` by ComfyUI's own weight patches: what linear deltas (gate off) must equal up to rounding."""
        clone = model.clone()
        for delta, strength in zip(self.deltas, strengths, strict=True):
            clone.add_patches({f"diffusion_model.{n}.weight": (delta.weight_delta(n),) for n in delta.up}, strength)
        return clone
