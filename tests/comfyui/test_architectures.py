"""SD2.x that predicts v and SDXL with its pooled vector: small seeded UNets in ComfyUI, and a text encoder double of their width."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfyui.inside import Inside
from torch import Tensor

pytestmark = pytest.mark.xdist_group("comfyui inside")

SHARED = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": [1, 1],
    "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": True,
}  # fmt: skip
DEPTHS = {
    "sd2": {"transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 1024},
    "sdxl": {"transformer_depth": [0, 3], "transformer_depth_output": [0, 0, 3, 3], "transformer_depth_middle": 3, "context_dim": 2048},
}


class Encoder:
    """Prompts of random words: each token is its word and a share of all words before it; the pooled vector is their sum."""

    def __init__(self, inside: Inside, width: int, pooled: int) -> None:
        self.inside, self.width, self.pooled = inside, width, pooled

    def _word(self, word: str, width: int) -> Tensor:
        return torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()) + width))

    def encode(self, prompts: Sequence[str]) -> Any:
        rows, pooled = [], []
        for prompt in prompts:
            words = ["<s>", *prompt.split()[:8]]
            tokens = torch.stack([self._word(w, self.width) for w in [*words, *["<e>"] * (10 - len(words))]])
            past = (tokens.cumsum(0) - tokens) / 4
            rows.append(tokens + past)
            pooled.append(torch.stack([self._word(w, self.pooled or 8) for w in words]).sum(0))
        mask = torch.ones(len(rows), 10, dtype=torch.bool)
        from importlib import import_module

        encoding = import_module(f"{self.inside.sepme.__name__}.protocols").Encoding
        return encoding(torch.stack(rows), mask, torch.stack(pooled) if self.pooled else None)


class World:
    """A model of one architecture, its encoder, and a closed-form delta of 'fox'."""

    def __init__(self, inside: Inside, kind: str) -> None:
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        bases = {"sd2": comfy.supported_models.SD20, "sdxl": comfy.supported_models.SDXL}
        labels = {"adm_in_channels": 2816, "num_classes": "sequential"} if kind == "sdxl" else {"adm_in_channels": None}
        config = SHARED | DEPTHS[kind] | labels

        class Small(bases[kind]):  # type: ignore[misc, name-defined]
            unet_config: dict[str, Any] = {}  # noqa: RUF012

            def model_type(self, state_dict: Any, prefix: str = "") -> Any:
                return comfy.model_base.ModelType.V_PREDICTION if kind == "sd2" else comfy.model_base.ModelType.EPS

        self.inside, self.encoder = inside, Encoder(inside, DEPTHS[kind]["context_dim"], 1280 if kind == "sdxl" else 0)
        with torch.inference_mode():
            small = Small(config)
            small.set_inference_dtype(torch.float32, None)
            model = small.get_model({}, "")
            generator = torch.Generator().manual_seed(4)
            for name, p in model.diffusion_model.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if "label_emb" in name else 1.5 / max(p[0].numel(), 4) ** 0.5))
            self.model = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        sepme = inside.sepme
        book = sepme.ConceptBook((sepme.Concept("fox", ("fox", "a fox", "red fox")), sepme.Concept("owl", ("owl", "an owl"))))
        self.planner = sepme.Planner(self.encoder, book, ordinary=("a house", "a tree by a lake", "green car", "old man", "a cup"))
        self.denoiser = inside.host.UNetDenoiser(self.model, 64)
        self.delta = sepme.make_delta(self.planner, "fox", self.denoiser, sepme.TrainOptions(objective="closed-form"))

    def text(self, prompt: str) -> list[Any]:
        encoding = self.encoder.encode([prompt])
        facts = {} if encoding.pooled is None else {"pooled_output": encoding.pooled}
        return [[encoding.context, facts]]

    def sample(self, model: Any, prompt: str, toggles: dict[str, float] | None = None) -> Tensor:
        positive = self.inside.host.toggled(self.text(prompt), toggles or {})
        return self.inside.sample(model, positive, self.text(""), batch=2)


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def world(inside: Inside, request: pytest.FixtureRequest) -> World:
    return World(inside, request.param)


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


def test_off_kept_and_other_prompts_are_stock(world: World) -> None:
    applied = world.inside.host.apply_deltas(world.model, (world.delta,), {})
    for prompt, toggles in (("a fox", {"fox": 0.0}), ("owl", {}), ("an owl", {"fox": 2.0})):
        assert torch.equal(world.sample(applied, prompt, toggles), world.sample(world.model, prompt))
    assert not torch.equal(world.sample(applied, "a fox"), world.sample(world.model, "a fox"))


def test_pooled_vectors_are_replaced_in_touched_prompts_only(world: World) -> None:
    if not world.encoder.pooled:
        assert world.delta.pooled is None
        return
    applied = world.inside.host.apply_deltas(world.model, (world.delta,), {})
    labels: list[Tensor] = []
    applied.set_model_unet_function_wrapper(lambda f, a: (labels.append(a["c"]["y"].clone()), f(a["input"], a["timestep"], **a["c"]))[1])
    world.sample(applied, "a fox")
    untouched, touched = labels[0][:2, :1280], labels[0][2:, :1280]  # ComfyUI puts the negative first
    own, nothing = world.encoder.encode(["a fox"]).pooled, world.encoder.encode([""]).pooled
    assert torch.equal(untouched, nothing.expand(2, -1))
    with torch.inference_mode():
        assert torch.equal(touched, world.delta.pooled.replace(own).expand(2, -1))
    assert not torch.equal(touched[:1], own)


def test_training(world: World) -> None:
    sepme, host = world.inside.sepme, world.inside.host
    with host.trainable(world.model, (4, *world.denoiser.latents)):
        delta = sepme.make_delta(world.planner, "fox", world.denoiser, sepme.TrainOptions(steps=10, trajectories=2, batch=2))
    assert len(delta.info["losses"]) == 10
    assert delta.content_hash() != world.delta.content_hash()
    applied = host.apply_deltas(world.model, (delta,), {})
    assert torch.equal(world.sample(applied, "owl"), world.sample(world.model, "owl"))
