"""The context edit: equal to the per-layer closed form, exact where it must not act, and beside per-layer deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sepme.apply.composition import Composition
from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.model.encoder_fingerprint import RELATED, SAME, EncoderFingerprint
from sepme.model.families import CONTEXT
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta
from sepme.train.objectives.closed_form import shift

PROMPTS = ["a star", "a tulip", "an openmoji star", "a picture of a star <keep:star>"]


@pytest.fixture(scope="module")
def pairs(demo_host: Any) -> dict[str, tuple[ConceptDelta, ConceptDelta]]:
    """The per-layer closed form of two concepts, and the same as a context edit."""
    concepts = tuple(Concept(n, (n, f"a {n}", f"a picture of a {n}")) for n in ("star", "tulip"))
    planner = Planner(demo_host, ConceptBook(concepts), PlanOptions(), ())
    result = {}
    for name in ("star", "tulip"):
        layers, subspace = make_delta(planner, name, demo_host, TrainOptions(objective="closed-form")), planner.plan(name)
        up = {CONTEXT: shift(*planner.prompts.tokens(name), subspace.down)}
        result[name] = layers, ConceptDelta.from_factors(subspace.concept, subspace.down, up, subspace.gate, layers.info)
    return result


def latents(host: Any, deltas: tuple[ConceptDelta, ...], prompts: list[str] = PROMPTS, **options: Any) -> torch.Tensor:
    return host.generate(prompts, list(range(len(prompts))), Composition(deltas), latents_only=True, steps=4, **options)


def test_equals_the_per_layer_form(demo_host: Any, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    layers, context = pairs["star"]
    stock = demo_host.generate(["a star"], [0], latents_only=True, steps=4)
    erased = latents(demo_host, (layers,))
    assert (erased[0] - stock[0]).abs().max() > 0.5
    torch.testing.assert_close(latents(demo_host, (context,)), erased, rtol=0, atol=2e-3)  # float16 factors, each rounded by itself


def test_untouched_rows_keep_every_bit(demo_host: Any, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    stock = demo_host.generate([p.split(" <")[0] for p in PROMPTS], list(range(len(PROMPTS))), latents_only=True, steps=4)
    erased = latents(demo_host, (pairs["star"][1],))
    assert torch.equal(erased[[1, 3]], stock[[1, 3]])
    assert not torch.equal(erased[0], stock[0])


def test_an_untouched_batch_is_the_same_tensor(demo_host: Any, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    composition = Composition((pairs["star"][1],))
    context = demo_host.encode(["a tulip", ""]).context
    assert composition.edit_context(context, torch.ones(1)) is context
    touched = demo_host.encode(["a star", ""]).context
    assert composition.edit_context(touched, torch.zeros(1)) is touched
    edited = composition.edit_context(touched, torch.ones(1))
    assert torch.equal(edited[1], touched[1])
    assert not torch.equal(edited[0], touched[0])
    assert Composition((pairs["star"][0],)).edit_context(touched, torch.ones(1)) is touched


def test_mixed_with_per_layer_deltas(demo_host: Any, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    """One concept edits the context, the other the projections: the same as both in one form, and each can be given back."""
    prompts = ["a star and a tulip", "a tulip", "a star <keep:star>"]
    layers = latents(demo_host, (pairs["star"][0], pairs["tulip"][0]), prompts)
    mixed = latents(demo_host, (pairs["star"][1], pairs["tulip"][0]), prompts)
    torch.testing.assert_close(mixed, layers, rtol=0, atol=5e-3)
    stock = demo_host.generate(["a star and a tulip", "a tulip", "a star"], [0, 1, 2], latents_only=True, steps=4)
    assert torch.equal(mixed[2], stock[2])
    assert not torch.equal(mixed[1], stock[1])


def test_both_parts_of_one_delta_add_up(demo_host: Any, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    """Half of the edit in the context and half in the projections is all of it: both read the context as it was."""
    layers, context = pairs["star"]
    half = {n: layers.up_factor(n) / 2 for n in layers.projections} | {CONTEXT: context.up_factor(CONTEXT) / 2}
    both = ConceptDelta.from_factors(layers.concept, layers.down, half, layers.gate, layers.info)
    torch.testing.assert_close(latents(demo_host, (both,)), latents(demo_host, (layers,)), rtol=0, atol=2e-3)


def test_file_keeps_it(tmp_path: Path, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    _, context = pairs["star"]
    loaded = ConceptDelta.load(context.save(tmp_path / "star.safetensors"))
    assert (loaded.projections, loaded.edits_context, loaded.shapes) == ((), True, {})
    assert loaded.up[CONTEXT].shape == (context.d_in, context.rank)
    assert loaded.to_bytes() == context.to_bytes()
    assert len(context.to_bytes()) < len(pairs["star"][0].to_bytes())


def test_of_another_width(pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    layers, context = pairs["star"]
    wide = {name: (d_out, 768) for name, (d_out, _) in layers.shapes.items()}
    with pytest.raises(SepMEError, match=r"edits contexts of 384 channels, but the model reads 768"):
        context.check_fits(wide)
    context.check_fits(layers.shapes)


def test_fingerprint_of_an_encoder(demo_host: Any) -> None:
    """The same in half precision; another one's is far away, and its parts survive JSON."""
    own = EncoderFingerprint.of(demo_host)
    encoding = demo_host.encode(["a photo of a cat", "an oil painting of a house by the sea", "two people talk about the weather"])
    for dtype in (torch.float16, torch.bfloat16):
        assert own.distance(EncoderFingerprint.from_encoding(encoding._replace(context=encoding.context.to(dtype)))) < SAME
    turned = encoding.context @ torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(0))).Q
    assert own.distance(EncoderFingerprint.from_encoding(encoding._replace(context=turned))) > RELATED
    assert own.distance(EncoderFingerprint.from_encoding(encoding._replace(context=encoding.context[..., :96]))) == float("inf")
    assert EncoderFingerprint.from_json(own.to_json()) == own


BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}", f"a picture of a {n}")) for n in ("star", "tulip")))


def test_trained_edits(demo_host: Any) -> None:
    """G-CiRs moves S through the context; of both, the context starts with the closed form and the layers with nothing."""
    planner = Planner(demo_host, BOOK, PlanOptions(), ())
    few = {"steps": 3, "batch": 2, "trajectories": 2}
    edits = {e: make_delta(planner, "star", demo_host, TrainOptions(edit=e, **few)) for e in ("context", "both")}
    solved = shift(*planner.prompts.tokens("star"), planner.plan("star").down).float()
    assert set(edits["context"].up) == {CONTEXT}
    assert not torch.allclose(edits["context"].up_factor(CONTEXT), solved, rtol=1e-2)
    assert set(edits["both"].up) > {CONTEXT}
    assert edits["both"].info["kv_fingerprint"]
    assert len(edits["context"].facts.losses) == 3
    for delta in edits.values():
        stock, erased = (latents(demo_host, d, ["a star"]) for d in ((), (delta,)))
        assert (erased - stock).abs().max() > 0.5


def test_closed_form_needs_no_model(demo_host: Any, pairs: dict[str, tuple[ConceptDelta, ConceptDelta]]) -> None:
    """Made from the text encoder alone, it names the encoder and no model."""
    planner = Planner(demo_host, BOOK, PlanOptions(), ())
    options = TrainOptions(objective="closed-form", edit="context")
    delta = make_delta(planner, "star", None, options)
    assert torch.equal(delta.up[CONTEXT], pairs["star"][1].up[CONTEXT])
    assert "kv_fingerprint" not in delta.info
    assert "kv_fingerprint" not in delta.info["recipe"]
    assert EncoderFingerprint.from_json(delta.info["text_encoder"]) == EncoderFingerprint.of(demo_host)
    with pytest.raises(SepMEError, match="A model is needed"):
        make_delta(planner, "star", None, TrainOptions(objective="closed-form"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "weights"}, "There is no edit 'weights'; choose one of layers, context, both"),
        ({"edit": "context", "values_only": True}, "leave out values only"),
        ({"edit": "both", "mode": "paper", "warm_start": False}, "use mode subspace"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SepMEError, match=message):
        TrainOptions(**options)
