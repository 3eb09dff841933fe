"""``sepme.erase``: a pipeline that is called as before, without the concepts, and as it was once they are given back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import sepme
from sepme.hosts.loading import LoadOptions, load_pipeline
from sepme.hosts.pipeline import PipelineEncoder
from sepme.plan.gate import ordinary_prompts
from sepme.train import erasures


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = load_pipeline("demo", LoadOptions())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates are calibrated on a few ordinary prompts here."""
    monkeypatch.setattr(erasures, "ordinary_prompts", lambda: ordinary_prompts()[:32])


def draw(pipe: Any, prompt: str, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    out = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, height=64, width=64, output_type="pt", **more)
    return out.images


def test_erased_switched_restored(pipe: Any) -> None:
    stock = {p: draw(pipe, p) for p in ("a star", "a tulip", "a twemoji star")}
    with sepme.erase(pipe, ["star", "twemoji"]) as erasure:
        assert not torch.equal(draw(pipe, "a star"), stock["a star"])
        assert not torch.equal(draw(pipe, "a star", num_images_per_prompt=2)[1], draw(pipe, "a star", num_images_per_prompt=2)[0])
        assert torch.equal(draw(pipe, "a tulip"), stock["a tulip"])
        erasure.toggles["star"] = 0
        assert torch.equal(draw(pipe, "a star"), stock["a star"])
        assert not torch.equal(draw(pipe, "a twemoji star"), stock["a twemoji star"])
        with pytest.raises(sepme.SepMEError, match="has an erasure already"):
            sepme.erase(pipe, ["tulip"])
        erasure.toggles["mon"] = 1
        with pytest.raises(sepme.SepMEError, match="no concept 'mon'"):
            draw(pipe, "a star")
    assert torch.equal(draw(pipe, "a twemoji star"), stock["a twemoji star"])
    assert not {"encode_prompt", "_sepme_erasure"} & set(vars(pipe))
    erasure.restore()  # a second time does nothing


def test_another_librarys_method_is_given_back(pipe: Any) -> None:
    own = pipe.encode_prompt
    pipe.encode_prompt = lambda *a, **k: own(*a, **k)
    before = pipe.encode_prompt
    sepme.erase(pipe, [sepme.Concept("star", anchor="a church")], preserve=["a tulip"]).restore()
    assert pipe.encode_prompt is before
    del pipe.encode_prompt


class TwoEncoders:
    """The part of an SDXL pipeline that reads prompts."""

    def __init__(self, pipe: Any) -> None:
        self.unet, self.tokenizer, self.text_encoder = pipe.unet, pipe.tokenizer, pipe.text_encoder
        self.tokenizer_2, self._execution_device = pipe.tokenizer, pipe.device
        config = CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"projection_dim": 24})
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.text_encoder_2 = CLIPTextModelWithProjection(config).eval().float()

    def encode_prompt(self, prompt: str) -> tuple[Any, ...]:
        cond, uncond = (PipelineEncoder(self).encode([p]) for p in (prompt, ""))
        return cond.context, uncond.context, cond.pooled, uncond.pooled


def test_pooled_vectors_of_sdxl(pipe: Any) -> None:
    tiny_xl = TwoEncoders(pipe)
    stock = tiny_xl.encode_prompt("a star")
    with sepme.erase(tiny_xl, ["star"], preserve=["a tulip"]):
        erased = tiny_xl.encode_prompt("a star")
    assert [torch.equal(a, b) for a, b in zip(stock, erased, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("kind", "concepts", "message"),
    [
        ("flux", ["star"], "not SimpleNamespace"),
        ("none", ["star"], "not SimpleNamespace"),
        ("good", [], "list of at least one name"),
        ("good", "star", "list of at least one name"),
    ],
)
def test_what_cannot_be_erased_is_said(pipe: Any, kind: str, concepts: Any, message: str) -> None:
    t5 = SimpleNamespace(config=SimpleNamespace(model_type="t5"))
    given = {
        "flux": SimpleNamespace(unet=1, text_encoder=t5, encode_prompt=len),
        "none": SimpleNamespace(unet=1, text_encoder=None, encode_prompt=len),
        "good": pipe,
    }[kind]
    with pytest.raises(sepme.SepMEError, match=message):
        sepme.erase(given, concepts)
