"""SD2.x that predicts v and SDXL with its pooled vector: seeded checkpoint files that ComfyUI detects, with its own text encoders.

Widths and layouts are the true ones where detection and CLIP need them; the text encoders have three layers, the images 64 pixels.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.checkpoint import save_checkpoint
from comfyui.inside import PACK, Inside
from torch import Tensor

pytestmark = pytest.mark.xdist_group("comfyui inside")

LAYERS = 3
FEW = {"num_hidden_layers": LAYERS}
OPTIONS: dict[str, dict[str, Any]] = {
    "sd2": {"model_name": "clip_h", "clip_h_model_config": FEW},
    "sdxl": {"clip_l_model_config": FEW, "clip_g_model_config": FEW},
}
ARCHITECTURE = {"sd2": "sd21", "sdxl": "sdxl"}


class World:
    """MODEL and CLIP of one architecture, as ComfyUI loads them from a file, and a closed-form delta of 'fox'."""

    def __init__(self, inside: Inside, kind: str, folder: Path) -> None:
        import comfy.sd

        self.inside, self.kind = inside, kind
        path = save_checkpoint(kind, folder / f"{kind}.safetensors", LAYERS)
        with torch.inference_mode():
            self.model, self.clip = comfy.sd.load_checkpoint_guess_config(str(path), te_model_options=OPTIONS[kind])[:2]
        path.unlink()
        sepme, self.encoder = inside.sepme, inside.host.ClipEncoder(self.clip)
        book = sepme.ConceptBook((sepme.Concept("fox", ("fox", "a fox", "red fox")), sepme.Concept("owl", ("owl", "an owl"))))
        self.planner = sepme.Planner(self.encoder, book, ordinary=("a house", "a tree by a lake", "green car", "old man", "a cup"))
        self.denoiser = inside.host.UNetDenoiser(self.model, 64)
        self.delta = sepme.make_delta(self.planner, "fox", self.denoiser, sepme.TrainOptions.for_mode(objective="closed-form"))

    def text(self, prompt: str) -> list[Any]:
        with torch.inference_mode():
            conditioning: list[Any] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        return conditioning

    def sample(self, model: Any, prompt: str, toggles: dict[str, float] | None = None) -> Tensor:
        positive = self.inside.host.toggled(self.text(prompt), toggles or {})
        return self.inside.sample(model, positive, self.text(""), batch=2, steps=2)


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def world(inside: Inside, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(inside, request.param, tmp_path_factory.mktemp("checkpoint"))


def test_the_host_knows_the_model(world: World) -> None:
    import comfy.model_base

    kinds = {"sd2": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}
    assert type(world.model.model) is kinds[world.kind]
    assert (world.denoiser.schedule.prediction == "v_prediction") is (world.kind == "sd2")
    assert world.delta.architecture == ARCHITECTURE[world.kind]


def test_prompts_are_read_as_by_the_host(world: World) -> None:
    """Several at once as one by one as CLIPTextEncode; a long prompt's pooled vector is its first chunk's."""
    long = "a fox in the snow, " * 20
    for prompts in (["a fox", "owl", ""], ["owl", long, "a fox"]):
        found = world.encoder.encode(prompts)
        assert (found.pooled is not None) is (world.kind == "sdxl")
        for i, prompt in enumerate(prompts):
            context, facts = world.text(prompt)[0]
            assert (found.context[i] - context[0].repeat(len(found.context[i]) // context.shape[1], 1)).abs().max() < 1e-4
            if found.pooled is not None:
                assert (found.pooled[i] - facts["pooled_output"][0]).abs().max() < 1e-4 * found.pooled.abs().max()


def test_noise_is_what_the_host_denoises_by(world: World) -> None:
    """``ε = (x − D(x; σ)) / σ`` of ComfyUI's own denoiser, for models that predict ε and v."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([world.model])
    model, encoding = world.model.model, world.encoder.encode(["a fox", "owl"])
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([700, 200])
    with torch.inference_mode():
        found = world.denoiser.predict(x_t, t, encoding.context, encoding.pooled)
        sigma = model.model_sampling.sigmas[t].reshape(-1, 1, 1, 1)
        x = x_t * (sigma**2 + 1).sqrt()
        more = {} if encoding.pooled is None else {"y": model.encode_adm(pooled_output=encoding.pooled, width=64, height=64, device="cpu")}
        denoised = model.apply_model(x, sigma.flatten(), c_crossattn=encoding.context, **more)
    expected = (x - denoised) / sigma
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_off_preserved_and_other_prompts_are_stock(world: World) -> None:
    applied = world.inside.host.apply_deltas(world.model, (world.delta,), {})
    for prompt, toggles in (("a fox", {"fox": 0.0}), ("owl", {}), ("an owl", {"fox": 2.0})):
        assert torch.equal(world.sample(applied, prompt, toggles), world.sample(world.model, prompt))
    assert not torch.equal(world.sample(applied, "a fox"), world.sample(world.model, "a fox"))


def test_pooled_vectors_are_replaced_in_touched_prompts_only(world: World) -> None:
    if world.kind == "sd2":
        assert world.delta.pooled is None
        return
    applied = world.inside.host.apply_deltas(world.model, (world.delta,), {})
    labels: list[Tensor] = []
    applied.set_model_unet_function_wrapper(lambda f, a: (labels.append(a["c"]["y"].clone()), f(a["input"], a["timestep"], **a["c"]))[1])
    world.sample(applied, "a fox")
    untouched, touched = labels[0][:2, :1280], labels[0][2:, :1280]  # ComfyUI puts the negative first
    own, uncond = (world.text(t)[0][1]["pooled_output"] for t in ("a fox", ""))
    assert torch.equal(untouched, uncond.expand(2, -1))
    with torch.inference_mode():
        assert torch.equal(touched, world.delta.pooled.replace(own).expand(2, -1))
    assert not torch.equal(touched[:1], own)


def test_training(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sepme, host, schedule = world.inside.sepme, world.inside.host, importlib.import_module(f"{PACK}.sepme.model.schedule")
    monkeypatch.setattr(schedule, "TRAJECTORY", schedule.TRAJECTORY._replace(steps=4))
    with host.trainable(world.model, (4, *world.denoiser.latent_shape)):
        delta = sepme.make_delta(world.planner, "fox", world.denoiser, sepme.TrainOptions(steps=4, trajectories=1, batch=1))
    assert len(delta.info["losses"]) == 4
    assert delta.content_hash() != world.delta.content_hash()
    applied = host.apply_deltas(world.model, (delta,), {})
    assert torch.equal(world.sample(applied, "owl"), world.sample(world.model, "owl"))
