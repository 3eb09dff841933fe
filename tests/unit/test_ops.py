"""The two operators: what they compute, that PyTorch accepts them (opcheck), constraints, a second copy of the pack."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sepme.apply import ops
from sepme.apply.constraints import Aligned, Contiguous, DivisibleBy, OneDevice, OneDType, broken

HALVES = [torch.float16, torch.bfloat16]


def problem(
    dtype: torch.dtype = torch.float32, rank: int = 5, d_in: int = 24, rows: int = 3
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Context, three weights of different widths, Yᵀ and H (the second row untouched)."""
    context = torch.randn(rows, 7, d_in).to(dtype)
    weights = [torch.randn(n, d_in).to(dtype) for n in (16, 8, 24)]
    h = torch.randn(rows, 7, rank)
    h[1] = 0
    return context, weights, torch.randn(rank, 48).to(dtype), h


def expected(context: Tensor, weights: list[Tensor], up: Tensor, h: Tensor) -> list[Tensor]:
    """Float64, written out."""
    blocks = (h.double() @ up.double()).split([len(w) for w in weights], dim=-1)
    return [context.double() @ w.double().T + block for w, block in zip(weights, blocks, strict=True)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_project_kv_is_base_plus_delta(dtype: torch.dtype, bound: float, rank: int) -> None:
    context, weights, up, h = problem(dtype, rank)
    found = ops.split(ops.project_kv(context, weights, up, h), weights, 3, 7)
    for out, exact, weight in zip(found, expected(context, weights, up, h), weights, strict=True):
        assert out.shape == (3, 7, len(weight))
        assert out.dtype == dtype
        assert (out.double() - exact).norm() <= bound * exact.norm()
        assert torch.equal(out[1], torch.nn.functional.linear(context, weight)[1])  # an untouched row gets nothing added
        assert rank == 0 or (out.double() - context.double() @ weight.double().T).norm() > 0.1


def test_project_kv_of_no_projection() -> None:
    context, _, _, h = problem()
    assert ops.project_kv(context, [], torch.zeros(5, 0), h).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_add_to_rows_writes_only_touched_rows(dtype: torch.dtype) -> None:
    base, h, up = torch.randn(4, 3, 5).to(dtype), torch.randn(2, 3, 2), torch.randn(2, 5)
    before = base.clone()
    out = ops.add_to_rows(base, h, up, torch.tensor([2, 0]))
    assert torch.equal(base, before)  # another pack may keep it
    assert torch.equal(out[[1, 3]], before[[1, 3]])
    assert torch.equal(out[[2, 0]], (before[[2, 0]].float() + h @ up).to(dtype))
    assert torch.equal(ops.add_to_rows(base, h[:0], up, torch.tensor([], dtype=torch.int64)), before)


def test_a_fresh_base_is_written_over_with_the_same_bits() -> None:
    base, h, up, rows = torch.randn(3, 7, 48).bfloat16(), torch.randn(2, 7, 5), torch.randn(5, 48), torch.tensor([2, 0])
    with torch.inference_mode():
        before, added = base.clone(), ops.add_to_rows(base, h, up, rows)
        assert torch.equal(base, before)
        written = ops.add_to_rows(base, h, up, rows, fresh=True)
    assert written is base
    assert torch.equal(written, added)
    assert not torch.equal(written, before)


def test_autocast_does_not_round_the_delta() -> None:
    base, h, up = torch.randn(2, 3, 5), torch.randn(1, 3, 2), torch.randn(2, 5)
    context, weights, stacked, full = problem()
    plain = ops.add_to_rows(base, h, up, torch.tensor([1])), ops.project_kv(context, weights, stacked, full)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.add_to_rows(base, h, up, torch.tensor([1])), plain[0])
        assert torch.equal(ops.project_kv(context, weights, stacked, full), plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype: torch.dtype, grad: bool) -> None:
    """Schema, autograd registration, fake tensors, tracing with dynamic shapes."""
    context, weights, up, h = problem(dtype)
    for tensor in (context, *weights, up, h):
        tensor.requires_grad_(grad)
    torch.library.opcheck(torch.ops.sepme.project_kv.default, (context, weights, up, h))
    base = torch.randn(3, 7, 16).to(dtype).requires_grad_(grad)
    part = torch.randn(2, 7, 5, requires_grad=grad)
    torch.library.opcheck(torch.ops.sepme.add_to_rows.default, (base, part, torch.randn(5, 16, requires_grad=grad), torch.tensor([2, 0])))


def test_gradients_are_those_of_the_plain_formula() -> None:
    context, weights, up, h = ([t.requires_grad_() for t in x] if isinstance(x, list) else x.requires_grad_() for x in problem())  # type: ignore[misc]
    inputs = [context, *weights, up, h]
    out = ops.project_kv(context, weights, up, h)
    upstream = torch.randn_like(out)
    plain = torch.cat([(context @ w.T + b).reshape(-1) for w, b in zip(weights, (h @ up).split([16, 8, 24], dim=-1), strict=True)])
    for ours, theirs in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    base, part, rows = torch.randn(3, 7, 48, requires_grad=True), h.detach()[:2].clone().requires_grad_(), torch.tensor([2, 0])
    inputs = [base, part, up]
    out = ops.add_to_rows(base, part, up, rows)
    upstream = torch.randn_like(out)
    plain = base.index_add(0, rows, part @ up)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# --- constraints


def test_constraints_say_what_they_ask() -> None:
    a, b = torch.zeros(4, 6), torch.zeros(6, 4).T
    inputs = {"a": [a], "b": [b], "odd": [torch.zeros(9)[1:]], "half": [a.half()], "far": [a.to("meta")]}
    both = {"a": [a], "b": [b]}
    cases = [
        (OneDType(("a", "b"), (torch.float32,)), OneDType(("a", "half"), ops.MATRICES), "a, half must share one type of float16, bfloat16"),
        (Contiguous(("a",)), Contiguous(("a", "b")), "a, b must be contiguous"),
        (DivisibleBy(("a",), 1, 3), DivisibleBy(("a",), -1, 4), "dimension -1 of a must be a multiple of 4"),
        (Aligned(("a",), 16), Aligned(("odd",), 16), "odd must start at a multiple of 16 bytes"),
    ]
    for holds, fails, words in cases:
        assert holds.check(inputs)
        assert not fails.check(inputs)
        assert words in (broken([holds, fails], inputs) or "")
    assert broken([OneDevice()], both) is None
    assert broken([OneDevice()], inputs) == "all tensors must lie on one device"


@pytest.fixture
def accelerated() -> Iterator[None]:
    """The CPU as a device with kernels."""
    ops.accelerate("cpu", lambda device: None)
    yield
    del ops._accelerators["cpu"]


def test_why_not(accelerated: None) -> None:
    context, weights, _, _ = problem(d_in=32)
    weights = [torch.randn(16, 32)]
    assert ops.why_not(ops.PROJECT_KV, context=context, weights=weights) is None
    assert "must share one type" in str(ops.why_not(ops.PROJECT_KV, context=context.half(), weights=weights))
    assert "multiple of 16" in str(ops.why_not(ops.PROJECT_KV, context=context, weights=[torch.randn(20, 32)]))
    assert "contiguous" in str(ops.why_not(ops.PROJECT_KV, context=context, weights=[torch.randn(32, 16).T]))
    ops.accelerate("cpu", lambda device: "Triton is not installed")
    assert ops.why_not(ops.PROJECT_KV, context=context, weights=weights) == "Triton is not installed"
    assert ops.why_not(ops.PROJECT_KV, context=context.to("meta"), weights=weights) == "there is no kernel for meta"


def test_a_second_copy_of_the_pack_shares_the_operators() -> None:
    """A host may load the checkout as a package of its own while the pip package is imported too."""
    root = Path(ops.__file__).parents[1]
    spec = importlib.util.spec_from_file_location("second_sepme", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["second_sepme"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        second = importlib.import_module("second_sepme.apply.ops")
        assert second is not ops
        context, weights, up, h = problem()
        assert torch.equal(second.project_kv(context, weights, up, h), ops.project_kv(context, weights, up, h))
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "second_sepme"]:
            del sys.modules[name]
