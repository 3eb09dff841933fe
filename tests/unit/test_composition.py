"""Compositions: what each prompt of a batch meets of each delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sepme.apply.composition import Composition
from sepme.concepts import Concept
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.plan.gate import ratios

SHAPES = {"middle_block.1.transformer_blocks.0.attn2.to_k": (6, 16), "middle_block.1.transformer_blocks.0.attn2.to_v": (10, 16)}
RANKS = (3, 1, 4)


@pytest.fixture(scope="module")
def deltas(make_random_delta: Callable[..., ConceptDelta]) -> tuple[ConceptDelta, ...]:
    return tuple(make_random_delta(n, SHAPES, rank=r, seed=i) for i, (n, r) in enumerate(zip(("star", "moon", "tree"), RANKS, strict=True)))


@pytest.fixture(scope="module")
def context() -> Tensor:
    return torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(3))


def gated(deltas: tuple[ConceptDelta, ...], context: Tensor) -> tuple[tuple[ConceptDelta, ...], Tensor]:
    """Deltas whose gates some rows pass and some do not, and which: ``(rows, N)`` bool."""
    statistics = torch.stack([ratios(context, d.down) for d in deltas], dim=1)
    gates = [float(v.sort().values[[1, 2]].mean()) for v in statistics.unbind(1)]
    return tuple(replace(d, gate=g) for d, g in zip(deltas, gates, strict=True)), statistics > torch.tensor(gates)


def by_hand(deltas: tuple[ConceptDelta, ...], context: Tensor, strengths: Tensor, open_: Tensor) -> Tensor:
    """The change of each projection's first layer, row by row and concept by concept, in float64: ``(rows, tokens, d_out)``."""
    name = next(iter(SHAPES))
    change = torch.zeros(*context.shape[:2], SHAPES[name][0], dtype=torch.float64)
    for b, row in enumerate(context.double()):
        for i, delta in enumerate(deltas):
            if open_[b, i]:
                change[b] += float(strengths[b, i]) * row @ delta.weight_delta(name).double().T
    return change


def applied(composition: Composition, context: Tensor, strengths: Tensor, gate: bool = True) -> Tensor:
    touch = composition.touch(context, strengths, gate)
    name = next(iter(SHAPES))
    change = torch.zeros(*context.shape[:2], SHAPES[name][0])
    change[touch.rows] = touch.h @ composition.up(name, touch.concepts).T
    return change


@pytest.mark.parametrize("gate", [True, False])
def test_each_row_meets_its_own_concepts(deltas: tuple[ConceptDelta, ...], context: Tensor, gate: bool) -> None:
    """Gate, partial, negative and strengths above one, in one batch, against a loop over rows and concepts."""
    deltas, open_ = gated(deltas, context)
    assert 0 < open_.sum() < open_.numel()
    strengths = torch.tensor([[1.0, 0, 0], [0.5, 1, -1], [0, 0, 0], [2, 0, 0.25], [1, 1, 1]])
    expected = by_hand(deltas, context, strengths, open_ if gate else torch.ones_like(open_))
    found = applied(Composition(deltas), context, strengths, gate)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    touched = Composition(deltas).touch(context, strengths, gate).rows
    met = (strengths != 0) & (open_ if gate else True)
    assert touched.tolist() == met.any(dim=1).nonzero().squeeze(1).tolist()


def test_untouched_rows_are_no_rows(deltas: tuple[ConceptDelta, ...], context: Tensor) -> None:
    closed = Composition(tuple(replace(d, gate=1.0) for d in deltas))  # a ratio is at most 1
    touch = closed.touch(context, torch.ones(3))
    assert touch.rows.tolist() == []
    assert touch.concepts == ()
    assert touch.h.shape == (0, 7, 0)
    assert len(closed.touch(context, torch.ones(3), gate=False).rows) == 5
    assert len(Composition(deltas).touch(context, torch.zeros(5, 3), gate=False).rows) == 0


def test_the_gate_is_strict(make_random_delta: Callable[..., ConceptDelta]) -> None:
    """Open only above γ: a token (3, 4) with D = (1, 0) has the ratio 0.6, exactly."""
    context, down = torch.zeros(1, 2, 16), torch.zeros(1, 16)
    context[0, 0, :2], down[0, 0] = torch.tensor([3.0, 4.0]), 1.0
    delta = replace(make_random_delta("star", SHAPES, rank=1), down=down)
    for gate, touched in ((0.6 - 1e-6, [0]), (0.6, []), (0.6 + 1e-6, [])):
        assert Composition((replace(delta, gate=gate),)).touch(context, torch.ones(1)).rows.tolist() == touched


def test_the_gate_weighs_rows_not_tokens(deltas: tuple[ConceptDelta, ...], context: Tensor) -> None:
    """One token above γ opens the whole row: the others carry their linear part too."""
    inside = torch.zeros(1, 4, 16)
    inside[0, 0] = deltas[0].down[0]  # ratio 1
    inside[0, 1:] = context[0, :3]
    composition = Composition((replace(deltas[0], gate=0.99),))
    touch = composition.touch(inside, torch.ones(1))
    assert touch.rows.tolist() == [0]
    assert torch.allclose(touch.h[0], inside[0] @ deltas[0].down.T, atol=1e-6)
    assert touch.h[0, 1:].abs().max() > 0


def test_only_active_columns_are_multiplied(deltas: tuple[ConceptDelta, ...], context: Tensor) -> None:
    composition = Composition(deltas)
    strengths = torch.zeros(5, 3)
    strengths[1, 2] = strengths[4, 0] = 1
    touch = composition.touch(context, strengths)
    assert touch.rows.tolist() == [1, 4]
    assert touch.concepts == (0, 2)
    assert touch.h.shape == (2, 7, RANKS[0] + RANKS[2])
    assert torch.equal(touch.h[0, :, :3], torch.zeros(7, 3))
    assert torch.equal(touch.h[1, :, 3:], torch.zeros(7, 4))
    assert composition.up(next(iter(SHAPES)), touch.concepts).shape == (6, 7)


def test_stacking(deltas: tuple[ConceptDelta, ...]) -> None:
    composition = Composition(deltas)
    assert composition.names == ("star", "moon", "tree")
    assert torch.equal(composition.down, torch.cat([d.down for d in deltas]))
    assert composition.owner.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    for name in SHAPES:
        assert torch.equal(composition.up(name, (0, 1, 2)), torch.cat([d.up_factor(name) for d in deltas], dim=1))


def test_one_strength_for_all_rows(deltas: tuple[ConceptDelta, ...], context: Tensor) -> None:
    composition, strengths = Composition(deltas), torch.tensor([1.0, -0.5, 0.0])
    one, each = composition.touch(context, strengths), composition.touch(context, strengths.expand(5, 3))
    assert torch.equal(one.h, each.h)
    assert one.concepts == each.concepts == (0, 1)
    assert strengths.tolist() == [1.0, -0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_h_is_float32(deltas: tuple[ConceptDelta, ...], context: Tensor, dtype: Any) -> None:
    rounded = context.to(dtype)
    touch = Composition(deltas).touch(rounded, torch.ones(3))
    assert touch.h.dtype == torch.float32
    assert torch.equal(touch.h, Composition(deltas).touch(rounded.float(), torch.ones(3)).h)


def test_mismatches(deltas: tuple[ConceptDelta, ...], context: Tensor, make_random_delta: Callable[..., ConceptDelta]) -> None:
    with pytest.raises(SepMEError, match="Two deltas erase 'STAR'; load one"):
        Composition((*deltas, replace(deltas[1], concept=Concept("STAR"))))
    other = make_random_delta("house", {n: (s[0], 24) for n, s in SHAPES.items()})
    with pytest.raises(SepMEError, match=r"'house' is for .*d_in 24.* but the delta of 'star' is"):
        Composition((deltas[0], other))
    composition = Composition(deltas)
    with pytest.raises(SepMEError, match="has 24 channels, the deltas 16"):
        composition.touch(torch.zeros(2, 7, 24), torch.ones(3))
    for strengths in (torch.ones(2), torch.ones(4, 3), torch.ones(5, 2), torch.ones(5)):
        with pytest.raises(SepMEError, match="do not fit 5 prompts and 3 deltas"):
            composition.touch(context, strengths)


def test_without_deltas_nothing_is_touched(context: Tensor) -> None:
    empty = Composition(())
    assert empty.names == ()
    assert len(empty.touch(context, torch.ones(0)).rows) == 0
