"""Objectives that are trained through ComfyUI's own models of other families, tiny: what its sampler calls is what training calls."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.inside import PACK, Inside
from torch import Tensor

pytestmark = pytest.mark.xdist_group("comfyui inside")

ORDINARY = ("a house", "a tree by a lake", "green car", "old man", "a cup")
CASES = {"flux": "context", "qwen_image": "context", "wan": "layers"}  # and what is edited
STEPS = 4  # of a denoising run


class World:
    """A family's MODEL and CLIP, and what trains on it."""

    def __init__(self, inside: Inside, family: str, dtype: torch.dtype = torch.float32) -> None:
        tiny = import_module("comfyui.tiny_families")
        with torch.inference_mode():
            self.model, self.clip = tiny.build(family, dtype)
        sepme, self.host = inside.sepme, inside.host
        book = sepme.ConceptBook((sepme.Concept("fox", ("fox", "a fox", "red fox on the hill")), sepme.Concept("owl", ("owl", "an owl"))))
        self.encoder = self.host.text_encoder(self.clip, self.model)
        self.planner = sepme.Planner(self.encoder, book, ordinary=ORDINARY)
        self.denoiser = self.host.denoiser_of(self.model, self.encoder, 64)

    def train(self, inside: Inside, **options: Any) -> Any:
        chosen = inside.sepme.TrainOptions.for_mode(steps=12, trajectories=2, batch=2, warm_start=False, learning_rate=0.05, **options)
        with self.denoiser.trainable(4):
            return inside.sepme.make_delta(self.planner, "fox", self.denoiser, chosen)

    def text(self, prompt: str, **toggles: float) -> Any:
        with torch.inference_mode():
            return self.host.toggled(self.host.conditioning(self.clip, prompt), toggles)

    def sample(self, model: Any, positive: Any, cfg: float) -> Tensor:
        """Latents of ComfyUI's own sampler."""
        import comfy.sample

        start = torch.zeros(1, *self.denoiser.latent_shape)
        with torch.inference_mode():
            made = comfy.sample.sample(
                model, self.denoiser.latents([3]), STEPS, cfg, "euler", "simple", positive, self.text(""), start, disable_pbar=True, seed=3
            )  # fmt: skip
        return made.clone()


@pytest.fixture(scope="module", params=list(CASES))
def world(inside: Inside, request: pytest.FixtureRequest) -> World:
    return World(inside, request.param)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    schedule = import_module(f"{PACK}.sepme.model.schedule")
    monkeypatch.setattr(schedule, "TRAJECTORY", schedule.TRAJECTORY._replace(steps=STEPS))
    return schedule


def test_runs_of_training_are_the_samplers(world: World, few: Any) -> None:
    """With the MODEL's own shift, whatever it is called with beside the prompt, and no token behind the shorter one's."""
    denoiser = world.denoiser
    read = world.encoder.encode(["", "a red fox on the hill by the lake"])
    with denoiser.trainable(2), torch.no_grad():
        sampling = denoiser.guided(few.Sampling(STEPS, 3.0))
        *_, found = few.runs(denoiser, denoiser.schedule, denoiser.latents([3]), read.context[1:], read.context[:1], read.pooled, sampling)
        found = world.model.model.process_latent_out(found)
    expected = world.sample(world.model, world.text("a red fox on the hill by the lake"), sampling.guidance)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_trained_erased_spared_restored(world: World, inside: Inside, few: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    edit = CASES[request.node.callspec.params["world"]]
    before = {name: weight.clone() for name, weight in world.model.model.state_dict().items()}
    delta = world.train(inside, edit=edit)
    assert all(torch.equal(weight, before[name]) for name, weight in world.model.model.state_dict().items())
    losses = delta.facts.losses
    assert losses[-1] < 0.75 * losses[0]
    assert delta.edits_context is (edit == "context")
    assert torch.equal(delta.down, world.planner.plan("fox").down)
    assert delta.certificate.worst_leakage < 0.05
    loaded = type(delta).load(delta.save(tmp_path / "fox.safetensors"))
    assert loaded.content_hash() == delta.content_hash()
    applied = world.host.apply_deltas(world.model, (loaded,), {})
    for prompt, toggles in (("an owl", {}), ("a fox", {"fox": 0.0})):
        assert torch.equal(world.sample(applied, world.text(prompt, **toggles), 2.0), world.sample(world.model, world.text(prompt), 2.0))
    assert not torch.equal(world.sample(applied, world.text("a fox"), 2.0), world.sample(world.model, world.text("a fox"), 2.0))


def test_memory_is_counted_and_half_precision_trains(inside: Inside, few: Any) -> None:
    """On weights in bfloat16; what is added in place, as ComfyUI does, is no obstacle to either."""
    memory = import_module(f"{PACK}.sepme.train.memory")
    world = World(inside, "qwen_image", torch.bfloat16)
    assert world.denoiser.dtype == torch.bfloat16
    with world.denoiser.trainable(4):
        options = inside.sepme.TrainOptions(edit="context", batch=2)
        assert memory.step_bytes(world.denoiser, world.planner.prompts.empty, options) > 2**16
    losses = world.train(inside, edit="context").facts.losses
    assert losses[-1] < 0.75 * losses[0]


def test_what_is_refused(inside: Inside) -> None:
    make = import_module(f"{PACK}.sepme.train.make")
    options, world = inside.sepme.TrainOptions.for_mode, World(inside, "qwen_image")
    for chosen, said in (
        (options(objective="fmn", edit="context"), "The objective fmn is for Stable Diffusion"),
        (options("paper"), "The mode paper is for Stable Diffusion"),
        (options(), "no layer reads text alone; choose the edit context"),
    ):
        with pytest.raises(ValueError, match=said):
            make.check_layers(world.denoiser, chosen)
    with pytest.raises(ValueError, match="multiples of 8 pixels, not 60"):
        inside.host.denoiser_of(world.model, world.encoder, 60)
    with pytest.raises(ValueError, match="other texts beside the context"):
        World(inside, "hunyuan_dit")
