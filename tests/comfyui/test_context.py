"""Context edits on a MODEL inside ComfyUI: applied where the conditioning enters, and no patch of the denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui.inside import PRESERVED, Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")

CONTEXT = "context"  # the site of a context edit


@pytest.fixture(scope="module")
def edits(inside: Inside) -> tuple[Any, ...]:
    """The deltas' directions and gates, with a context edit each."""
    made, generator = [], torch.Generator().manual_seed(3)
    for delta in inside.deltas:
        s = torch.randn(delta.d_in, delta.rank, generator=generator)
        made.append(type(delta).from_factors(delta.concept, delta.down, {CONTEXT: s}, delta.gate, delta.info))
    return tuple(made)


def test_touched_rows_move_and_all_others_are_stock(inside: Inside, edits: tuple[Any, ...]) -> None:
    model = inside.host.apply_deltas(inside.model, edits, {})
    prompt = inside.text("an openmoji star")
    stock = inside.sample(inside.model, prompt, batch=2)
    erased = inside.sample(model, prompt, batch=2)
    assert not any(torch.equal(a, b) for a, b in zip(erased, stock, strict=True))
    assert torch.equal(inside.sample(inside.model, prompt, batch=2), stock)
    for text in (*PRESERVED, ""):
        assert torch.equal(inside.sample(model, inside.text(text)), inside.sample(inside.model, inside.text(text)))
    off = {"star": 0.0, "openmoji": 0.0}
    assert torch.equal(inside.sample(inside.host.apply_deltas(inside.model, edits, off), prompt, batch=2), stock)
    assert torch.equal(inside.sample(model, inside.toggled("an openmoji star", off), batch=2), stock)


def test_the_denoiser_is_not_patched(inside: Inside, edits: tuple[Any, ...]) -> None:
    model = inside.host.apply_deltas(inside.model, edits, {})
    assert set(model.object_patches) - set(inside.model.object_patches) == {"extra_conds"}
    seen: list[set[str]] = []

    def wrapper(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        seen.append(set(args["c"]))
        return apply(args["input"], args["timestep"], **args["c"])

    plain, counted = inside.model.clone(), model.clone()
    for clone in (plain, counted):
        clone.set_model_unet_function_wrapper(wrapper)
    prompt = inside.text("an openmoji star")
    inside.sample(plain, prompt)
    stock, seen[:] = list(seen), []
    inside.sample(counted, prompt)
    assert seen == stock  # as many forward passes, called with the same arguments


def test_beside_per_layer_deltas(inside: Inside, edits: tuple[Any, ...]) -> None:
    """Half of an edit in the context and half in the projections is all of it, and each concept has its own toggle."""
    star, openmoji = inside.deltas
    weights = {n: inside.model.model.diffusion_model.get_submodule(n).weight.float() for n in star.projections}
    layered = {n: w @ edits[0].up_factor(CONTEXT) for n, w in weights.items()}
    whole = type(star).from_factors(star.concept, star.down, layered, star.gate, star.info)
    halves = {n: y / 2 for n, y in layered.items()} | {CONTEXT: edits[0].up_factor(CONTEXT) / 2}
    half = type(star).from_factors(star.concept, star.down, halves, star.gate, star.info)
    prompt = inside.text("an openmoji star")
    one, other = (inside.sample(inside.host.apply_deltas(inside.model, (d, openmoji), {}), prompt) for d in (whole, half))
    stock = inside.sample(inside.model, prompt)
    assert (one - stock).abs().max() > 0.01
    torch.testing.assert_close(other, one, rtol=0, atol=float((one - stock).abs().max()) * 2e-3)
    off = {"star": 0.0, "openmoji": 0.0}
    assert torch.equal(inside.sample(inside.host.apply_deltas(inside.model, (half, openmoji), off), prompt), stock)
    only = inside.host.apply_deltas(inside.model, (openmoji,), {})
    both = inside.host.apply_deltas(inside.model, (half, openmoji), {"star": 0.0})
    context = prompt[0][0]  # c D is one product, of one delta's directions or of two
    alone, beside = inside.sepme.Composition((openmoji,)), inside.sepme.Composition((half, openmoji))
    edited = alone.edit_context(context, torch.tensor([[1.0]])), beside.edit_context(context, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(*edited, rtol=0, atol=1e-6)
    moved = inside.sample(only, prompt)
    torch.testing.assert_close(inside.sample(both, prompt), moved, rtol=0, atol=float((moved - stock).abs().max()) * 2e-5)
