"""The arithmetic at run time as two PyTorch operators, ``torch.ops.sepme.project_kv`` and ``torch.ops.sepme.add_to_rows``.

Their bodies here are plain PyTorch: the reference that every kernel is compared with, and what runs where there is no kernel.
Faster ones register themselves for a device type (:func:`accelerate`); :func:`why_not` says why they would not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .constraints import Aligned, Constraint, Contiguous, DivisibleBy, OneDevice, OneDType, broken

MATRICES = (torch.float16, torch.bfloat16, torch.float32)
PROJECT_KV: tuple[Constraint, ...] = (
    OneDevice(),
    OneDType(("context", "weights"), MATRICES),
    Contiguous(("weights",)),
    DivisibleBy(("weights",), 0, 16),
    DivisibleBy(("weights",), 1, 16),
    Aligned(("weights",), 16),
)
ADD_TO_ROWS: tuple[Constraint, ...] = (OneDType(("base",), MATRICES),)

# by device type: why the kernels registered for it cannot run on a device (None: they can)
_accelerators: dict[str, Callable[[torch.device], str | None]] = {}


def project_kv(context: Tensor, weights: Sequence[Tensor], up: Tensor, h: Tensor) -> Tensor:
    """All keys and values of a prompt batch at once: ``c W_pᵀ + H Y_pᵀ`` for every projection p (METHOD, section 7).

    Args:
        context: ``(rows, tokens, d_in)``.
        weights: ``(d_out_p, d_in)`` each, of the context's dtype.
        up: Yᵀ of all projections side by side, ``(R, Σ d_out_p)``, of the context's dtype.
        h: ``gate(c D) ⊙ s``, ``(rows, tokens, R)`` float32, 0 in untouched rows.

    Returns:
        ``(rows · tokens · Σ d_out_p,)``: one block per projection; :func:`split` shows them. Differentiable.
    """
    return torch.ops.sepme.project_kv(context, list(weights), up, h)


def add_to_rows(base: Tensor, h: Tensor, up: Tensor, rows: Tensor, fresh: bool = False) -> Tensor:
    """Keys or values with ``H Yᵀ`` added in touched rows; the other rows keep their bits.

    Args:
        base: ``(rows, tokens, d_out)``, the host's own projection.
        h: ``(touched, tokens, R)`` float32.
        up: Yᵀ ``(R, d_out)`` float32.
        rows: ``(touched,)`` int64, different indices into base.
        fresh: nobody else holds base, so it may be written over; else it is left as it is.

    Returns:
        shape and dtype of base. Differentiable.
    """
    if base.device.type not in _accelerators and not torch.is_grad_enabled():
        return add_to_rows_eager(base, h, up, rows, fresh)  # once per layer: what the dispatcher adds would show
    return torch.ops.sepme.add_to_rows(base, h, up, rows)


def split(flat: Tensor, weights: Sequence[Tensor], rows: int, tokens: int) -> list[Tensor]:
    """Views ``(rows, tokens, d_out_p)`` of what :func:`project_kv` returned."""
    sizes = [rows * tokens * w.shape[0] for w in weights]
    return [block.view(rows, tokens, w.shape[0]) for block, w in zip(flat.split(sizes), weights, strict=True)]


def project_kv_eager(context: Tensor, weights: Sequence[Tensor], up: Tensor, h: Tensor) -> Tensor:
    """The body of :func:`project_kv`: base in the model's dtype, delta in float32, each rounded once."""
    with no_autocast(context.device):
        blocks = []
        for weight, start in zip(weights, _starts(weights), strict=True):
            base = linear(context, weight)
            if h.shape[-1]:
                base = (base.float() + h @ up[:, start : start + weight.shape[0]].float()).to(base.dtype)
            blocks.append(base.reshape(-1))
        return torch.cat(blocks) if blocks else context.new_empty(0)


def add_to_rows_eager(base: Tensor, h: Tensor, up: Tensor, rows: Tensor, fresh: bool = False) -> Tensor:
    """The body of :func:`add_to_rows`."""
    out = base if fresh else base.clone(memory_format=torch.contiguous_format)
    with no_autocast(base.device):
        # the product by itself: summed onto the base, a row's last bit would depend on the other rows' concepts
        for row, delta in zip(rows.tolist(), h @ up, strict=True):
            out[row].add_(delta)  # in float32, rounded once
    return out


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Float32 stays float32 inside; costs nothing where nothing is cast."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def accelerate(device_type: str, unavailable: Callable[[torch.device], str | None]) -> None:
    """Note that kernels are registered for a device type; doing it again is harmless.

    Args:
        unavailable: says why they cannot run on a device (no driver, a device that is too old), None if they can.
    """
    _accelerators[device_type] = unavailable


def why_not(constraints: Sequence[Constraint], **inputs: Tensor | Sequence[Tensor]) -> str | None:
    """Why the eager body runs on these inputs, in words; None when a kernel runs.

    Args:
        constraints: PROJECT_KV or ADD_TO_ROWS.
        inputs: the tensors that they name; the first one's device decides.
    """
    tensors = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in inputs.items()}
    device = next(iter(tensors.values()))[0].device
    if device.type not in _accelerators:
        return f"there is no kernel for {device.type}"
    return _accelerators[device.type](device) or broken(constraints, tensors)


def _starts(weights: Sequence[Tensor]) -> list[int]:
    """Where each projection's columns begin in ``up``."""
    return list(accumulate((w.shape[0] for w in weights), initial=0))[:-1]


def _project_kv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    context, h, up, *weights = ctx.saved_tensors
    tokens = context.reshape(-1, context.shape[-1])
    by_row = h.reshape(-1, h.shape[-1])
    to_context, to_h, to_up, to_weights = torch.zeros_like(tokens), torch.zeros_like(by_row), torch.zeros_like(up), []
    for weight, start, block in zip(weights, _starts(weights), split(grad, weights, 1, len(tokens)), strict=True):
        columns = slice(start, start + weight.shape[0])
        to_context += block[0] @ weight
        to_h += block[0].float() @ up[:, columns].float().T
        to_up[:, columns] = (by_row.T @ block[0].float()).to(up.dtype)
        to_weights.append(block[0].T @ tokens)
    return to_context.view_as(context), to_weights, to_up, to_h.view_as(h)


def _add_to_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    h, up, rows = ctx.saved_tensors
    touched = grad[rows].float()
    return grad.clone(), touched @ up.T, h.flatten(0, 1).T @ touched.flatten(0, 1), None


def _define() -> list[Any]:
    """Define both operators, unless another copy of this module has (a host may hold the pack and the installed package)."""
    if hasattr(torch.ops.sepme, "project_kv"):
        return []
    first = torch.library.custom_op(
        "sepme::project_kv", project_kv_eager, mutates_args=(), schema="(Tensor context, Tensor[] weights, Tensor up, Tensor h) -> Tensor"
    )
    first.register_fake(
        lambda context, weights, up, h: context.new_empty(context.shape[0] * context.shape[1] * sum(w.shape[0] for w in weights))
    )
    first.register_autograd(
        _project_kv_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[3], inputs[2], *inputs[1])
    )
    second = torch.library.custom_op(
        "sepme::add_to_rows",
        lambda base, h, up, rows: add_to_rows_eager(base, h, up, rows),
        mutates_args=(),
        schema="(Tensor base, Tensor h, Tensor up, Tensor rows) -> Tensor",
    )
    second.register_fake(lambda base, h, up, rows: torch.empty_like(base, memory_format=torch.contiguous_format))
    second.register_autograd(_add_to_rows_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))
    return [first, second]


_operators = _define()
