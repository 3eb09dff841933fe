"""What the kernels compute, against float64, on fresh random numbers and poisoned outputs.

By Triton's interpreter on CPU tensors, and on a GPU where there is one. The interpreter computes bfloat16 wrongly without a word,
so bfloat16 is compared on GPUs only.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
WIDTHS = [(d_in, d_out) for d_in in (768, 1024, 2048) for d_out in (320, 640, 1280)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the launcher asks for is full of NaN, so that an element that nobody writes is seen."""
    original = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:  # with options it is the interpreter that asks
        made = original(self, *size, **options)
        return made if options else made.fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def problem(
    device: str, dtype: torch.dtype, rows: int, tokens: int, d_in: int, d_outs: tuple[int, ...], rank: int
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Context, weights, Yᵀ and H of sizes as they occur: K and V about 1, the delta about as large as the base."""
    context = torch.randn(rows, tokens, d_in)
    weights = [torch.randn(n, d_in) / d_in**0.5 for n in d_outs]
    up = torch.randn(rank, sum(d_outs)) / max(rank, 1) ** 0.5
    h = torch.randn(rows, tokens, rank)
    return context.to(device, dtype), [w.to(device, dtype) for w in weights], up.to(device, dtype), h.to(device)


def check(kernels: SimpleNamespace, context: Tensor, weights: list[Tensor], up: Tensor, h: Tensor, config: Any = None) -> list[Tensor]:
    """Run the kernel and compare every projection with float64; returns the projections."""
    flat = kernels.projection.project_kv(context, weights, up, h, config)
    assert flat.dtype == context.dtype
    count, bound, found = context.shape[0] * context.shape[1], BOUNDS[context.dtype], []
    columns = up.double().split([len(w) for w in weights], dim=1)
    for block, weight, y in zip(flat.split([count * len(w) for w in weights]), weights, columns, strict=True):
        exact = context.double().flatten(0, 1) @ weight.double().T + h.double().flatten(0, 1) @ y
        assert (block.view(exact.shape).double() - exact).norm() <= bound * exact.norm()
        assert (block.view(exact.shape).double() - exact).abs().max() <= 4 * bound * exact.abs().max()
        found.append(block.view(context.shape[0], context.shape[1], -1))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_all_widths(kernels: SimpleNamespace, d_in: int, d_out: int, dtype: torch.dtype) -> None:
    check(kernels, *problem(kernels.device, dtype, 1, 77, d_in, (d_out,), 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 7, 8, 31, 32, 33, 160, 800])
def test_all_ranks(kernels: SimpleNamespace, rank: int, dtype: torch.dtype) -> None:
    check(kernels, *problem(kernels.device, dtype, 1, 77, 128, (64, 96), rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 63), (1, 64), (1, 65), (2, 77), (3, 77), (4, 154), (1, 257)])
def test_ragged_rows(kernels: SimpleNamespace, rows: int, tokens: int, dtype: torch.dtype) -> None:
    check(kernels, *problem(kernels.device, dtype, rows, tokens, 64, (32, 80), 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_projections_of_all_widths(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    """Blocks at the edges of projections, d_in that no block divides, widths below a block."""
    check(kernels, *problem(kernels.device, dtype, 2, 7, 80, (320, 16, 640, 48, 1280, 320, 112), 12))
    check(kernels, *problem(kernels.device, dtype, 2, 7, 40, (24, 7, 1, 130), 3))


def test_every_configuration(kernels: SimpleNamespace) -> None:
    """Each set of tile sizes in the table, whatever the family: the same numbers within rounding."""
    dtypes = {"half": torch.float16, "float32": torch.float32}
    configs = [(dtypes[kind], c) for kinds in kernels.configs.load().values() for kind, found in kinds.items() for c in found]
    sizes = {(dtype, c.block_m, c.block_n, c.block_k, c.block_r): c for dtype, c in configs}
    assert len(sizes) >= 4
    for (dtype, *_), config in sizes.items():
        check(kernels, *problem(kernels.device, dtype, 2, 77, 160, (320, 96), 40), replace(config, per_processor=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strengths_concepts_and_untouched_rows(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    """H as a composition makes it: concepts of ranks 1, 8 and 3, negative, partial and large strengths, rows with none."""
    context, weights, up, h = problem(kernels.device, dtype, 4, 11, 64, (48, 32), 12)
    strengths = torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 0.0], [0.25, 2.0, 0.0], [0.0, 0.0, 0.0]])
    owner = torch.tensor([0] * 1 + [1] * 8 + [2] * 3)
    h = h * strengths[:, owner][:, None].to(kernels.device)
    found = check(kernels, context, weights, up, h)
    without = check(kernels, context, weights, up, torch.zeros_like(h))
    alone = check(kernels, context, weights, up[:0], h[..., :0])
    for a, b, c in zip(found, without, alone, strict=True):
        assert torch.equal(a[[1, 3]], b[[1, 3]])  # whatever the other rows do
        assert not torch.equal(a[[0, 2]], b[[0, 2]])
        assert torch.equal(b, c)  # nothing toggled on is nothing added


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_contiguous(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    context, weights, up, h = problem(kernels.device, dtype, 4, 9, 64, (48, 32), 6)
    expected = check(kernels, context[::2], weights, up, h[::2])
    strided = context.transpose(0, 1).contiguous().transpose(0, 1)[::2]
    assert not strided.is_contiguous()
    found = check(kernels, strided, weights, up.T.contiguous().T, h.transpose(0, 1).contiguous().transpose(0, 1)[::2])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_table_follows_weights_that_move(kernels: SimpleNamespace) -> None:
    """Values written in place need no new table; a weight at another address does."""
    context, weights, up, h = problem(kernels.device, torch.float32, 1, 5, 32, (16, 32), 2)
    kernels.projection._tables.clear()
    check(kernels, context, weights, up, h)
    weights[0].mul_(2)
    check(kernels, context, weights, up, h)
    assert len(kernels.projection._tables) == 1
    weights[1] = weights[1] * 3
    check(kernels, context, weights, up, h)
    assert len(kernels.projection._tables) == 2
    keep = []
    for _ in range(20):
        keep.append([w.clone() for w in weights])
        check(kernels, context, keep[-1], up, h)
    assert len(kernels.projection._tables) == 8


def test_a_table_is_not_taken_for_other_weights_at_its_address(kernels: SimpleNamespace) -> None:
    """Allocators give freed memory again, to a weight of another width or type too."""
    memory = torch.randn(4096, device=kernels.device) / 8
    for dtype, d_in in ((torch.float32, 64), (torch.float32, 32), (torch.float16, 64), (torch.float16, 32)):
        context, _, up, h = problem(kernels.device, dtype, 1, 5, d_in, (32,), 2)
        memory.copy_(torch.randn(4096) / 8)
        weight = memory.view(dtype)[: 32 * d_in].view(32, d_in)
        weight.copy_(torch.randn(32, d_in) / d_in**0.5)
        check(kernels, context, [weight], up, h)


def test_nothing_to_do(kernels: SimpleNamespace) -> None:
    context, weights, up, h = problem(kernels.device, torch.float32, 1, 5, 32, (16,), 2)
    assert kernels.projection.project_kv(context, [], up[:, :0], h).shape == (0,)
    assert kernels.projection.project_kv(context[:0], weights, up, h[:0]).shape == (0,)


# --- the delta added into touched rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "d_out", "tokens"), [*itertools.product([1, 8, 33], [320, 1280], [77]), (800, 64, 9), (3, 7, 1), (0, 16, 5)]
)
def test_add_to_rows(kernels: SimpleNamespace, rank: int, d_out: int, tokens: int, dtype: torch.dtype) -> None:
    """Touched rows are right to one rounding; the others, and the base, keep their bits."""
    base = torch.randn(5, tokens, d_out).to(kernels.device, dtype)
    h, up = torch.randn(3, tokens, rank, device=kernels.device), torch.randn(rank, d_out, device=kernels.device)
    rows, before = torch.tensor([4, 0, 2], device=kernels.device), base.clone()
    for given in (up, up.T.contiguous().T):
        out = kernels.rows.add_to_rows(base, h, given, rows)
        exact = before[rows].double() + h.double() @ up.double()
        error = (out[rows].double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-5 * exact.abs().max()).all()
        assert torch.equal(out[[1, 3]], before[[1, 3]])
        assert torch.equal(base, before)


def test_add_to_rows_of_odd_inputs(kernels: SimpleNamespace) -> None:
    base, h, up = (torch.randn(*s, device=kernels.device) for s in ((3, 8, 32), (2, 8, 4), (4, 32)))
    rows = torch.tensor([2, 1], device=kernels.device)
    expected = kernels.rows.add_to_rows(base, h, up, rows)
    strided = base.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(kernels.rows.add_to_rows(strided, h.transpose(0, 1).contiguous().transpose(0, 1), up, rows), expected)
    assert torch.equal(kernels.rows.add_to_rows(base, h[:0], up, rows[:0]), base)
