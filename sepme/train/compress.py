"""Full-width w to the concept's subspace: the delta file of a solution of mode paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Compressed(NamedTuple):
    """D ``(d_in, k)`` float64, orthonormal, in the span of Sp; Y ``(d_out, k)`` by projection name; what it lost."""

    basis: Tensor
    up: dict[str, Tensor]
    facts: dict[str, Any]


def compress(w: Mapping[str, Tensor], null: Tensor, tokens: Tensor, beta: float, max_rank: int, energy: float) -> Compressed:
    """Restrict ``ΔW_l = w_l (β Sp)ᵀ`` to the row space of ``C Sp``, then to the k directions that lose least on C.

    On the concept's prompts only ``C ΔW_lᵀ = (C Sp)(β w_l)ᵀ`` shows. With ``C Sp = U S Xᵀ`` and ``B_l = β w_l X`` that is
    ``U (B_l S)ᵀ``; its best rank-k approximation over all layers together follows from the SVD of the stacked ``B S``. At
    ``k = rank(C Sp)`` nothing is lost.

    Args:
        w: ``(d_out, m)`` by projection name.
        null: Sp ``(d_in, m)``.
        tokens: C ``(n, d_in)``, all tokens of the concept's prompts.
        max_rank: cap on k.
        energy: share of ``Σ_l ‖C ΔW_lᵀ‖²`` that k directions must carry; 1: all of it.

    Returns:
        the factors; ``facts`` holds ``rank``, ``full_rank`` and ``response_loss`` by k: ``‖C (ΔW − ΔW_k)ᵀ‖ / ‖C ΔWᵀ‖``.
    """
    tokens, null = tokens.double(), null.double()
    _, values, right = torch.linalg.svd(tokens @ null, full_matrices=False)
    full = max(1, int((values > 1e-9 * tokens.norm()).sum()))
    s, x = values[:full], right[:full].T
    b = {name: beta * value.double() @ x for name, value in w.items()}
    _, power, rows = torch.linalg.svd(torch.linalg.qr(torch.cat(list(b.values())) * s, mode="r").R, full_matrices=False)
    share = power.square().cumsum(0) / power.square().sum().clamp_min(1e-300)
    k = min(full if energy >= 1 else int((share < energy).sum()) + 1, max_rank, full)
    if k < full:
        directions, rest = torch.linalg.qr(rows[:k].T / s[:, None])
        up = {name: (value * s) @ rows[:k].T @ rest.T for name, value in b.items()}
    else:
        directions, up = torch.eye(full, dtype=torch.float64, device=x.device), b
    ranks = sorted({k, *(2**e for e in range(12) if 2**e < full)})
    loss = {str(i): float((1 - share[min(i, len(share)) - 1]).clamp_min(0).sqrt()) for i in ranks}
    basis, triangle = torch.linalg.qr(null @ x @ directions)
    up = {name: y @ triangle.T for name, y in up.items()}
    return Compressed(basis, up, {"rank": basis.shape[1], "full_rank": full, "response_loss": loss | {str(full): 0.0}})
