"""SDXL's pooled text vector, which enters the time embedding and carries the concept too (METHOD, section 8)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
