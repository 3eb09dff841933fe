"""The delta added into touched rows: ``base[row] + H Yᵀ``, summed in float32, rounded once; the other rows are copied as they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_R, WARPS = 32, 64, 16, 4


@triton.jit
def add_to_rows_kernel(
    base,  # (rows, tokens, d_out)
    h,  # (touched, tokens, R) float32
    up,  # (R, d_out) float32
    rows,  # (touched,) int64
    out,  # as base
    tokens,
    d_out,
    rank,
    up_stride_r,
    up_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    touched = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    inside = (m[:, None] < tokens) & (n[None, :] < d_out)
    place = (tl.load(rows + touched) * tokens + m[:, None]) * d_out + n[None, :]
    acc = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    h_tile = h + (touched * tokens + m[:, None]) * rank + r[None, :]
    y_tile = up + r[:, None].to(tl.int64) * up_stride_r + n[None, :].to(tl.int64) * up_stride_n
    for first in range(0, rank, BLOCK_R):
        s = tl.load(h_tile + first, mask=(m[:, None] < tokens) & (r[None, :] < rank - first), other=0.0)
        y = tl.load(y_tile, mask=(r[:, None] < rank - first) & (n[None, :] < d_out), other=0.0)
        acc = tl.dot(s, y, acc, input_precision="ieee")
        y_tile += BLOCK_R * up_stride_r
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def add_to_rows(base: Tensor, h: Tensor, up: Tensor, rows: Tensor) -> Tensor:
    """The Triton body of ``torch.ops.sepme.add_to_rows``; see ``sepme/apply/ops.py`` for shapes."""
    out = base.clone(memory_format=torch.contiguous_format)
    tokens, d_out, rank = base.shape[1], base.shape[2], up.shape[0]
    if len(rows) == 0 or rank == 0 or out.numel() == 0:
        return out
    up = up.float()
    grid = (triton.cdiv(d_out, BLOCK_N), triton.cdiv(tokens, BLOCK_M), len(rows))
    with torch.cuda.device_of(base):
        add_to_rows_kernel[grid](
            out, h.float().contiguous(), up, rows.to(torch.int64).contiguous(), out, tokens, d_out, rank, up.stride(0), up.stride(1),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out
