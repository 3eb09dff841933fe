"""The real code of NegPip and ControlNet beside ours, on the UNet that Automatic1111 runs: rows of a batch, restoring, exactness.

``python real_neighbours.py WEBUI NEGPIP CONTROLNET`` with einops installed, each a checkout; asserts, and says what it did.
"""

# ruff: noqa: I001 (what is imported depends on paths set by the first)
from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import negpip
import real_a1111  # makes the others importable
import torch

import modules.script_callbacks
import modules.shared
from ldm.modules.diffusionmodules import util
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from modules import toy
from modules.processing import StableDiffusionProcessingTxt2Img, process_images
from modules.prompt_parser import words
from real_a1111 import Settings, Tables, host
from sepme_extension.sepme.apply.composition import Composition

NEGPIP, CONTROLNET = Path(sys.argv[2]), Path(sys.argv[3])
UNET = {
    "in_channels": 4, "model_channels": 32, "num_res_blocks": 2, "attention_resolutions": [1, 2, 4], "channel_mult": (1, 1, 1, 1),
    "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": toy.D_IN, "legacy": False,
}  # fmt: skip


def randomised(module: torch.nn.Module) -> Any:
    """Zero modules would hide everything."""
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape)
    return module.eval()


def checkpoint() -> Any:
    """Twelve blocks in and twelve out, as ControlNet expects them, sixteen attention layers, as NegPip does."""
    torch.manual_seed(0)
    model = toy.Checkpoint(kind="a1111")
    model.model = toy.DiffusionWrapper(randomised(UNetModel(image_size=8, out_channels=4, use_checkpoint=False, **UNET)))
    model.is_sdxl = False
    model.cond_stage_model = SimpleNamespace(tokenize_line=lambda text: (words(text), len(words(text))))
    modules.shared.sd_model = model
    return model


class Scripts:
    """Calls a neighbour's script in the host's order, ours behind it."""

    def __init__(self, neighbour: Any, deltas: Any, positive: list[dict[str, float]] | None, negative: list[dict[str, float]]) -> None:
        self.neighbour, self.deltas, self.tags, self.said = neighbour, deltas, (positive, negative), []
        self.alwayson_scripts, self.attached = [], None

    def call(self, name: str, p: Any, *args: Any, **kwargs: Any) -> None:
        if self.neighbour is not None and name in ("process_batch", "postprocess"):
            getattr(self.neighbour, name)(p, *((True,) if name == "process_batch" else (None,)))
        if name == "process_before_every_sampling" and self.tags[0] is not None:
            tables = Tables.make(Composition(tuple(self.deltas)), {}, *self.tags)
            self.attached = host.ModelPatch(p, tables, Settings(), self.said.append)
            modules.script_callbacks.on_cfg_denoiser(self.attached.expect)
        if name == "postprocess_batch" and self.attached is not None:
            modules.script_callbacks.remove_callbacks_for_function(self.attached.expect)
            self.attached.detach()


def draw(prompts: list[str], tags: Any = None, neighbour: Any = None, controlled: Any = None, deltas: Any = (), negative: str = "") -> Any:
    """Latents; ``tags`` of positive and negative prompts, None for stock."""
    positive, negatives = tags or (None, [{}])
    scripts = Scripts(neighbour, deltas, positive, negatives)
    p = StableDiffusionProcessingTxt2Img(
        prompt=prompts, negative_prompt=negative, seed=0, steps=3, batch_size=len(prompts), sampler_name="Euler", width=64, height=64
    )
    p.scripts = scripts
    if controlled is not None:
        with controlled(p):
            latents = process_images(p)[0]
    else:
        latents = process_images(p)[0]
    if neighbour is not None:
        neighbour.postprocess(p, None)
    assert not scripts.said, scripts.said  # every row was known
    return latents


def leftovers(model: Any) -> list[str]:
    return [n for n, m in model.model.named_modules() if isinstance(m.__dict__.get("forward"), host.Hook)]


def check(model: Any, delta: Any, part: str = "", **more: Any) -> None:
    """Rows with tags of their own, a negative prompt, restored; ``more`` is the neighbour, ``part`` what every prompt gets for it."""
    same, houses = [f"a star {part}"] * 2, [f"a house {part}", f"a red house {part}"]
    stock = draw(same, negative="a house", **more)
    assert not torch.equal(stock, draw(same, negative="a house")), "the neighbour does nothing"
    more |= {"deltas": [delta]}
    for erased, preserved in ((0, 1), (1, 0)):
        tags = [{"star": 1.0} if i == erased else {"star": 0.0} for i in range(2)]
        sampled = draw(same, (tags, [{}, {}]), negative="a house", **more)
        assert torch.equal(sampled[preserved], stock[preserved])
        assert not torch.equal(sampled[erased], stock[erased])
    unharmed = draw(houses, **more)
    assert torch.equal(draw(houses, ([{"star": 1.0}] * 2, [{}, {}]), **more), unharmed)
    plain = draw(houses, negative="a star", **more)
    sampled = draw(houses, ([{}, {}], [{"star": 1.0}, {}]), negative="a star", **more)
    assert torch.equal(sampled[1], plain[1])
    assert not torch.equal(sampled[0], plain[0])
    assert torch.equal(draw(same, negative="a house", **more), stock)
    assert leftovers(model) == []


class ControlNet:
    """ControlNet's own hook on a run, with its own control model or its attention injection."""

    def __init__(self, model: Any) -> None:
        sys.path.insert(0, str(CONTROLNET))
        sys.modules["ldm.models.diffusion.ddpm"] = util  # type: ignore[assignment]  # it wants pytorch_lightning, for one function of this
        sys.modules["modules.lowvram"] = ModuleType("modules.lowvram")
        modules.lowvram = sys.modules["modules.lowvram"]  # type: ignore[attr-defined]
        modules.devices.get_device_for = lambda task: torch.device("cpu")  # type: ignore[attr-defined]
        modules.shared.cmd_opts.lowvram = modules.shared.cmd_opts.medvram = False
        self.hook, cldm = importlib.import_module("scripts.hook"), importlib.import_module("scripts.cldm")
        self.hook.register_schedule(model)
        self.model = model
        self.control = cldm.PlugableControlModel({**UNET, "hint_channels": 3, "use_fp16": False})
        randomised(self.control)

    @contextmanager
    def __call__(self, p: Any) -> Iterator[None]:
        yield from self._hooked(p, "canny", self.hook.ControlModelType.ControlNet, self.control)

    @contextmanager
    def reference(self, p: Any) -> Iterator[None]:
        yield from self._hooked(p, "reference_only", self.hook.ControlModelType.AttentionInjection, None)

    def _hooked(self, p: Any, name: str, kind: Any, model: Any) -> Iterator[None]:
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
        param = self.hook.ControlParams(
            control_model=model, preprocessor={"name": name, "threshold_a": 0.5, "threshold_b": 0.5}, hint_cond=hint, weight=1.0,
            guidance_stopped=False, start_guidance_percent=0.0, stop_guidance_percent=1.0, advanced_weighting=None,
            control_model_type=kind, hr_hint_cond=None, global_average_pooling=False, soft_injection=False, cfg_injection=False,
        )  # fmt: skip
        param.used_hint_cond, param.used_hint_cond_latent = hint, torch.ones(2 * p.batch_size, 4, 8, 8)
        hook = self.hook.UnetHook()
        hook.hook(self.model.unet, self.model, [param], p)
        torch.manual_seed(0)  # reference_only adds noise to the picture that it looks at
        try:
            yield
        finally:
            hook.restore()


def main() -> None:
    model = checkpoint()
    delta = real_a1111.trained(model)
    script = negpip.load(NEGPIP)
    assert not script.forge
    neighbour = script.Script()
    check(model, delta, negpip.PART, neighbour=neighbour)
    print("NegPip: rows of a batch, restored: bit-identical")
    controlled = ControlNet(model)
    check(model, delta, controlled=controlled)
    print("ControlNet: rows of a batch, restored: bit-identical")
    check(model, delta, controlled=controlled.reference)
    print("ControlNet's reference_only: the same")
    check(model, delta, negpip.PART, controlled=controlled, neighbour=neighbour)
    print("both at once: the same")


if __name__ == "__main__":
    main()
