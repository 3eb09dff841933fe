"""Up-factors in one solve: least squares of ``c (W + ΔW)ᵀ -> C* Wᵀ`` along the allowed directions (METHOD, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def solve(
    weights: Mapping[str, Tensor], tokens: Tensor, target: Tensor, down: Tensor, ridge: float = 1e-6, values_only: bool = False
) -> dict[str, Tensor]:
    """``Y_l = W_l (C* − C)ᵀ H (HᵀH + μI)⁻¹`` with ``H = C D``.

    Args:
        weights: ``(d_out, d_in)`` by projection name (``<layer>.to_k`` / ``.to_v``).
        tokens: ``C`` ``(n, d_in)``, the concept's tokens. target: ``C*`` ``(n, d_in)``, the anchor's, aligned by position.
        down: ``Dᵀ`` ``(k, d_in)``.
        ridge: μ relative to the mean eigenvalue of ``HᵀH``.
        values_only: leave to_k as it is.

    Returns:
        Y ``(d_out, k)`` float32 by projection name.
    """
    c, goal, d = tokens.double(), target.double(), down.double().T
    h = c @ d
    gram = h.T @ h
    mu = ridge * gram.diagonal().mean()
    shift = torch.linalg.solve(gram + mu * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), h.T @ (goal - c)).T
    result = {}
    for name, weight in weights.items():
        zero = values_only and name.endswith(".to_k")
        y = torch.zeros(weight.shape[0], d.shape[1]) if zero else weight.float() @ shift.to(weight.device, torch.float32)
        result[name] = y.float()
    return result
