"""diffusers' pipelines of other families, tiny, to train through: what their own call does is what training does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from planning import OPTIONS, book_of
from tiny import pipelines
from tiny.probe import WIDTH
from torch import Tensor

from sepme.apply.composition import Composition
from sepme.errors import SepMEError
from sepme.hosts.transformer import TransformerHost
from sepme.model import schedule
from sepme.model.protocols import Encoding
from sepme.model.schedule import Sampling, runs
from sepme.plan.planner import Planner
from sepme.train import TrainOptions
from sepme.train.make import check_layers, make_delta

FAMILIES = list(pipelines.PIPELINES)
STEPS = 4


class Words:
    """A token for each word, and one in front: every prompt at its own length."""

    name, free_length, clip_skip = "words", True, 0

    def __init__(self, pooled: int = 0) -> None:
        self.pooled = pooled

    def encode(self, prompts: Sequence[str]) -> Encoding:
        rows = [torch.stack([_token(word) for word in ("", *prompt.split())]) for prompt in prompts]
        context = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        pooled = torch.stack([row[0, : self.pooled] for row in rows]) if self.pooled else None
        return Encoding(context, context.ne(0).any(dim=-1), pooled)


def _token(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def host_of(family: str, size: int = 64) -> TransformerHost:
    reader: Any = Words(16 if family == "flux1" else 0)
    return TransformerHost(pipelines.build(family), reader, size)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TRAJECTORY", schedule.TRAJECTORY._replace(steps=STEPS))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "pixart"])  # whose scheduler is no Euler's
@torch.no_grad()
def test_runs_are_the_pipelines(family: str) -> None:
    """Shift, timesteps, signs, masks and the length of prompts."""
    host, pipe = host_of(family), pipelines.build(family)
    read = host.encode(["", "a star", "a star by the sea"])
    start = host.latents([3, 4])
    steps = 1 if family == "wan" else STEPS  # whose scheduler spaces more of them in another way
    pooled = None if read.pooled is None else read.pooled[[0, 0, 1, 2]]
    *_, found = runs(host, host.schedule, start, read.context[1:], read.context[[0, 0]], pooled, Sampling(steps, 1.0))
    for i, tokens in ((0, 3), (1, 6)):
        given: Any = read.context[i + 1 : i + 2, :tokens]
        known = {
            "prompt_embeds": list(given) if family == "z_image" else given, "prompt_attention_mask": torch.ones(1, tokens, dtype=bool),
            "prompt_embeds_mask": torch.ones(1, tokens, dtype=bool), "num_frames": 1, "height": 64, "width": 64, "output_type": "latent",
            "pooled_prompt_embeds": None if read.pooled is None else read.pooled[i + 1 : i + 2], "num_inference_steps": steps,
            "latents": start[i : i + 1], "true_cfg_scale": 1.0, "return_dict": False,
            "sigmas": torch.linspace(1, 1 / steps, steps).tolist(),
        }  # fmt: skip
        known |= {} if "true_cfg_scale" in host._takes else {"guidance_scale": 0.0}
        expected = pipe(**{name: value for name, value in known.items() if name in host._takes})[0]
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "edit"), [("flux1", "context"), ("qwen_image", "context"), ("wan", "layers"), ("pixart", "layers")])
def test_trained_and_spared(family: str, edit: str, few: None) -> None:
    host = host_of(family)
    before = {name: weight.clone() for name, weight in host.transformer.state_dict().items()}
    planner = Planner(host, book_of(3), OPTIONS, ())
    options = TrainOptions.for_mode(steps=12, trajectories=2, batch=2, warm_start=False, learning_rate=0.1, edit=edit)
    delta = make_delta(planner, "star", host, options)
    assert min(delta.facts.losses[6:]) < 0.75 * delta.facts.losses[0]
    assert delta.edits_context is (edit == "context")
    assert all(torch.equal(weight, before[name]) for name, weight in host.transformer.state_dict().items())
    if edit == "context":
        read, on = host.encode(["a star", "a heart"]), torch.ones(2, 1)
        edited, x, t = Composition((delta,)).edit_context(read.context, on), host.latents([1, 2]), torch.tensor([500, 500])
        with torch.no_grad():
            stock, erased = (host.predict(x, t, context, read.pooled) for context in (read.context, edited))
        assert not torch.equal(erased[0], stock[0])
        assert torch.equal(erased[1], stock[1])


def test_what_is_refused() -> None:
    host = host_of("z_image")
    for options, said in (
        (TrainOptions.for_mode(objective="fmn", edit="context"), "objective fmn is for Stable Diffusion"),
        (TrainOptions.for_mode("paper"), "mode paper is for Stable Diffusion"),
        (TrainOptions(), "choose the edit context"),
    ):
        with pytest.raises(SepMEError, match=said):
            check_layers(host, options)
    with pytest.raises(SepMEError, match=r"ZImagePipeline cannot be called .*; check its folder, and --size"):
        _ = host_of("z_image", 60).latent_shape
    pipe = pipelines.build("pixart")
    pipe.scheduler = DDPMScheduler(prediction_type="sample")
    with pytest.raises(SepMEError, match="predicts sample, which is not known"):
        _ = TransformerHost(pipe, Words(), 64).schedule  # type: ignore[arg-type]
