"""One concept's trainable increment: ``ΔW_l = w_l (β B)ᵀ`` with fixed directions B, in layers or on the context itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.families import CONTEXT


def context_site(d_in: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> dict[str, Tensor]:
    """The context as a text projection whose weight is the identity: what an increment adds there, all layers read.

    It has the identity's shape and takes no memory: nobody multiplies by it. Its one variable S ``(d_in, m)`` edits the context,
    ``c' = c + (c B) (β S)ᵀ``, which is ``w_l = W_l S`` in every layer.
    """
    return {CONTEXT: torch.ones((), dtype=dtype, device=device).expand(d_in, d_in)}


@dataclass(frozen=True)
class Increment:
    """Eq. 9-10 with B = Sp (mode paper) or B = D (mode subspace); without B, ΔW = β w is any matrix (mode unrestricted).

    Attributes:
        basis: Bᵀ ``(m, d_in)`` or None.
        beta: β.
        w: the trainable variables ``(d_out, m)`` by the name of their site (a projection, or :data:`CONTEXT`), in the training dtype.
    """

    basis: Tensor | None
    beta: float
    w: Mapping[str, nn.Parameter]

    @staticmethod
    def zeros(weights: Mapping[str, Tensor], basis: Tensor | None, beta: float, values_only: bool = False) -> Increment:
        """An increment that changes nothing yet.

        Args:
            weights: ``(d_out, d_in)`` by site, the model's K/V weights or :func:`context_site`; w is at least float32, float64 where
                they are.
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
        """Sites that it changes."""
        return list(self.w)

    @property
    def up(self) -> dict[str, Tensor]:
        """Y = β w ``(d_out, m)`` by site, as it is now, on the CPU."""
        return {name: self.beta * w.detach().cpu() for name, w in self.w.items()}

    def fill(self, up: Mapping[str, Tensor]) -> None:
        """Set w so that :attr:`up` is what is given, for the sites that are given."""
        for name, value in up.items():
            if name in self.w:
                self.w[name].data.copy_(value / self.beta)

    def features(self, context: Tensor) -> Tensor:
        """``c B`` ``(batch, tokens, m)`` of a context ``(batch, tokens, d_in)``: once per pass, for all layers."""
        context = context.to(next(iter(self.w.values())).dtype)
        return context if self.basis is None else context @ self.basis.T

    def term(self, name: str, features: Tensor) -> Tensor:
        """What the increment adds at a site, ``c ΔWᵀ`` ``(batch, tokens, d_out)``, whose features are given."""
        return features @ (self.beta * self.w[name]).T

    def penalty(self, regularise: str) -> Tensor:
        """``‖w‖_1 / M`` (Eq. 11) or ``‖ΔW‖_1 / M`` (Eq. 3); M: the number of sites trained."""
        total = torch.zeros((), device=next(iter(self.w.values())).device)
        for w in self.w.values():
            total = total + (w if regularise == "w" else self._delta(w)).abs().sum()
        return total / len(self.w)

    def _delta(self, w: Tensor) -> Tensor:
        """ΔW ``(d_out, d_in)``."""
        return self.beta * (w if self.basis is None else w @ self.basis)
