"""One concept's trainable increment: ``ΔW_l = w_l (β B)ᵀ`` with fixed directions B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Increment:
    """Eq. 9-10 with B = Sp (mode paper) or B = D (mode subspace); without B, ΔW = β w is any matrix (mode unrestricted).

    Attributes:
        basis: Bᵀ ``(m, d_in)`` or None. beta: β.
        w: the trainable variables ``(d_out, m)`` by projection name, in the training dtype.
    """

    basis: Tensor | None
    beta: float
    w: Mapping[str, nn.Parameter]

    @staticmethod
    def zeros(weights: Mapping[str, Tensor], basis: Tensor | None, beta: float, values_only: bool = False) -> Increment:
        """An increment that changes nothing yet.

        Args:
            weights: the model's K/V weights ``(d_out, d_in)`` by projection name; w is at least float32, float64 where they are.
        """
        chosen = {n: weight for n, weight in weights.items() if not (values_only and n.endswith("to_k"))}
        some = next(iter(chosen.values()))
        dtype = torch.promote_types(some.dtype, torch.float32)
        basis = None if basis is None else basis.to(some.device, dtype)
        width = some.shape[1] if basis is None else len(basis)
        w = {n: nn.Parameter(torch.zeros(len(weight), width, dtype=dtype, device=weight.device)) for n, weight in chosen.items()}
        return Increment(basis, beta, w)

    @property
    def names(self) -> list[str]:
        """Projections that it changes."""
        return list(self.w)

    def features(self, context: Tensor) -> Tensor:
        """``c B`` ``(batch, tokens, m)`` of a context ``(batch, tokens, d_in)``: once a pass, for all layers."""
        context = context.to(next(iter(self.w.values())).dtype)
        return context if self.basis is None else context @ self.basis.T

    def term(self, name: str, features: Tensor) -> Tensor:
        """What the increment adds to a projection's output, ``c ΔWᵀ`` ``(batch, tokens, d_out)``."""
        return features @ (self.beta * self.w[name]).T

    def penalty(self, regularise: str) -> Tensor:
        """``‖w‖_1 / M`` (Eq. 11) or ``‖ΔW‖_1 / M`` (Eq. 3); M: the number of projections (layers) trained."""
        total = torch.zeros((), device=next(iter(self.w.values())).device)
        for w in self.w.values():
            total = total + (w if regularise == "w" else self._delta(w)).abs().sum()
        return total / len(self.w)

    def _delta(self, w: Tensor) -> Tensor:
        """ΔW ``(d_out, d_in)``."""
        return self.beta * (w if self.basis is None else w @ self.basis)
