"""SDXL's pooled text vector, which enters the time embedding and carries the concept too (METHOD, section 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .directions import PlanOptions, concept_basis

PooledFacts = dict[str, Any]  # of a certificate: mode (replaced or left), rank, residual, leakage


@dataclass(frozen=True)
class Pooled:
    """Where the pooled vector carries a concept, and what stands there instead.

    Attributes:
        down: ``(k, d_pooled)`` float32, orthonormal rows, (numerically) null on the pooled vectors of everything else known.
        anchor: ``(k,)`` float32, the anchor's components along them.
    """

    down: Tensor
    anchor: Tensor

    def shift(self, pooled: Tensor) -> Tensor:
        """``(a − p D) Dᵀ``: what to add to ``p`` ``(rows, d_pooled)``, so that its component along D becomes the anchor's; float32."""
        down = self.down.to(pooled.device)
        return (self.anchor.to(pooled.device) - pooled.float() @ down.T) @ down

    def replace(self, pooled: Tensor) -> Tensor:
        """The pooled vectors of fully erased rows, in their own dtype."""
        return (pooled.float() + self.shift(pooled)).to(pooled.dtype)


def residual(part: Pooled | None, pooled: Tensor, anchor: Tensor) -> float:
    """Worst ``‖p' − p*‖ / ‖p − p*‖`` over a concept's prompts ``(n, d_pooled)``: 1 when the vector is left as it is.

    What stays below 1 is what the concept's prompts share with other known ones (their wording), or what the cap on k left.
    """
    before = (pooled.double() - anchor.double()).norm(dim=-1)
    after = before if part is None else (pooled.double() + part.shift(pooled).double() - anchor.double()).norm(dim=-1)
    return float((after / before.clamp_min(1e-12)).max())


def leakage(part: Pooled, pooled: Tensor) -> float:
    """Worst ``‖p D‖ / ‖p‖`` over known prompts ``(n, d_pooled)``; the row gate keeps it from acting."""
    return float(((pooled.float() @ part.down.T).norm(dim=-1) / pooled.float().norm(dim=-1).clamp_min(1e-12)).max())


def plan_pooled(own: Tensor, anchor: Tensor, known: Tensor, null: Tensor | None, options: PlanOptions) -> tuple[Pooled | None, PooledFacts]:
    """Directions of the pooled vector of a concept, and what is known about them.

    Args:
        own: pooled vectors ``(n, d_pooled)`` of the concept's prompts.
        anchor: its anchor's, one row.
        known: everything else's, float64.
        null: directions ``(d_pooled, m)`` float64 that may change; None leaves the vector as it is.
    """
    part = None
    if null is not None:
        down = concept_basis(own.double(), null, options.max_rank, options.energy).T
        part = Pooled(down.float().contiguous(), (down @ anchor[0].double()).float()) if len(down) else None
    facts: PooledFacts = {"mode": "left" if part is None else "replaced", "residual": residual(part, own, anchor)}
    return part, facts | ({"rank": len(part.down), "leakage": leakage(part, known)} if part else {})
