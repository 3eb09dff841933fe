"""Keys and values of all layers in one launch: ``c W_pᵀ + H Y_pᵀ`` for every projection p, one accumulator, rounded once.

A persistent grouped matrix product: the programs share out tiles of (output block, row block) over all projections. Weights stay
where the host has them; a table holds the address of every output block. Tiles that read the same weights follow each other, so
that a weight comes from memory once and from the L2 cache for the other row blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, choose, family

COLUMNS = 5  # of the table: address, columns of the block, its first column in up, d_out, first column of its projection
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


@triton.jit
def project_kv_kernel(
    context,  # (M, D_IN)
    table,  # (blocks, COLUMNS) int64
    up,  # (R, columns)
    h,  # (M, R) float32
    out,  # one (M, d_out) block per projection
    rows,  # M
    rank,  # R
    columns,  # Σ d_out
    blocks,
    D_IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    for tile in range(tl.program_id(0), row_blocks * blocks, tl.num_programs(0)):
        entry = table + (tile // row_blocks) * COLUMNS
        weight = tl.multiple_of(tl.load(entry).to(context.dtype), 16)
        width = tl.multiple_of(tl.load(entry + 1), 16)
        column = tl.multiple_of(tl.load(entry + 2), 16)
        d_out = tl.multiple_of(tl.load(entry + 3), 16)
        start = tl.multiple_of(tl.load(entry + 4), 16)
        m = (tile % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        # rows and columns past the end read the first one instead; they are not stored
        m_in = tl.where(m < rows, m, 0)
        n_in = tl.where(n < width, n, 0)
        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        c_tile = context + m_in[:, None] * D_IN + k[None, :]
        w_tile = weight + n_in[None, :] * D_IN + k[:, None]
        for first in range(0, D_IN, BLOCK_K):
            if D_IN % BLOCK_K == 0:
                c = tl.load(c_tile + first)
                w = tl.load(w_tile + first)
            else:
                c = tl.load(c_tile + first, mask=k[None, :] < D_IN - first, other=0.0)
                w = tl.load(w_tile + first, mask=k[:, None] < D_IN - first, other=0.0)
            acc = tl.dot(c, w, acc, input_precision=PRECISION)
        h_tile = h + m_in[:, None] * rank + r[None, :]
        y_tile = up + r[:, None].to(tl.int64) * columns + column + n[None, :]
        for first in range(0, rank, BLOCK_R):
            s = tl.load(h_tile + first, mask=r[None, :] < rank - first, other=0.0)
            y = tl.load(y_tile, mask=(r[:, None] < rank - first) & (n[None, :] < width), other=0.0)
            acc = tl.dot(s.to(y.dtype), y, acc, input_precision=PRECISION)
            y_tile += BLOCK_R * columns
        place = out + start * rows + (column - start) + m[:, None].to(tl.int64) * d_out + n[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < width))


def project_kv(context: Tensor, weights: Sequence[Tensor], up: Tensor, h: Tensor, config: Config | None = None) -> Tensor:
    """The Triton body of ``torch.ops.sepme.project_kv``; see ``sepme/apply/ops.py`` for shapes."""
    rows, d_in, rank, columns = h.shape[0] * h.shape[1], context.shape[-1], up.shape[0], sum(len(w) for w in weights)
    out = context.new_empty(rows * columns)
    if out.numel() == 0:
        return out
    name = family(context.device)
    config = config or choose(name, context.dtype, rows)
    table = _table(weights, config.block_n, context.device)
    tiles = len(table) * triton.cdiv(rows, config.block_m)
    with torch.cuda.device_of(context):
        project_kv_kernel[(min(tiles, _processors(context.device) * config.per_processor),)](
            context.reshape(rows, d_in).contiguous(), table, up.to(context.dtype).contiguous(), h.reshape(rows, rank).contiguous(), out,
            rows, rank, columns, len(table),
            D_IN=d_in, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
            PRECISION=precision(context.dtype, name), COLUMNS=COLUMNS, num_warps=config.warps, num_stages=config.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def precision(dtype: torch.dtype, name: str) -> str:
    """How products are taken: float32 as three tf32 products on NVIDIA's tensor cores, exactly on AMD's (which have float32)."""
    return "ieee" if dtype != torch.float32 or name.startswith("gfx") else "tf32x3"


def _table(weights: Sequence[Tensor], block_n: int, device: torch.device) -> Tensor:
    """Where each output block is. Cached while the weights stay where they are: it holds addresses, not values."""
    places = [(w.data_ptr(), len(w), w.stride(0) * w.element_size()) for w in weights]
    key = (block_n, device, *places)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    entries, start = [], 0
    for address, d_out, row_bytes in places:
        for first in range(0, d_out, block_n):
            entries.append((address + first * row_bytes, min(block_n, d_out - first), start + first, d_out, start))
        start += d_out
    _tables[key] = torch.tensor(entries, dtype=torch.int64).to(device)
    while len(_tables) > 8:
        _tables.popitem(last=False)
    return _tables[key]


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
