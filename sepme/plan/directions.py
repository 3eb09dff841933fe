"""Token rows -> directions: null spaces, concept subspaces and generalised eigenvectors, in float64 and O(d_in²) memory;
for wide encoders in O(rows · d_in), see :class:`Span`.

``C`` ``(n, d_in)`` are a concept's tokens, ``A`` everything else's, ``G`` the Gram matrix of both (METHOD, sections 3 and 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_numbers
from ..errors import SepMEError
from .tokens import Padding

Mode = Literal["exact", "tolerance", "soft", "auto"]
MANY = 50  # concepts from which mode soft is the default: prompts that single gates open for by mistake add up (docs/capacity.md)
EXACT_RTOL = 1e-6
GRAM_RTOL = 1e-4  # smaller singular values are not read off a Gram matrix, which squares them
TINY = 1e-300
WIDE, WIDEST = 2048, 8192  # channels from which on planning works in the span of the rows; and up to which more rows than that are taken
RANGES: dict[str, tuple[float, float]] = {
    "tolerance": (1e-15, 1 - 1e-9),
    "epsilon": (1e-12, 1e12),
    "max_rank": (1, 1 << 15),
    "energy": (1e-9, 1),
    "min_kept_energy": (0, 1),
    "nearby": (0, 1 << 14),
}


@dataclass(frozen=True)
class PlanOptions:
    """How directions are chosen.

    Attributes:
        mode: ``exact`` (numerical null space), ``tolerance`` (directions of A under a relative singular value count as null),
            ``soft`` (generalised eigenvectors), or ``auto``: the strictest of them that leaves room for every concept.
        tolerance: that relative singular value.
        epsilon: ε of ``soft``, relative to the mean ``‖c_t‖²`` of all tokens.
        max_rank: cap on k.
        energy: share of the concept's energy in the null space that k directions must carry, if the cap allows.
        min_kept_energy: refuse when less than this share of the concept's energy lies along D.
        padding: whether tokens after the prompt's end constrain and carry concepts (``all``) or not (``none``).
        pooled: whether the pooled vector, where the model has one, is replaced along the concept or left as it is.
        nearby: how many words near the concepts are preserved and calibrate gates too, see ``nearby.py``.
    """

    mode: Mode = "tolerance"
    tolerance: float = 0.006
    epsilon: float = 0.3
    max_rank: int = 8
    energy: float = 0.9
    min_kept_energy: float = 1e-4
    padding: Padding = "all"
    pooled: Literal["replace", "leave"] = "replace"
    nearby: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "tolerance", "soft", "auto") or self.padding not in ("all", "none"):
            raise SepMEError(
                f"Unknown mode {self.mode!r} or padding {self.padding!r}; modes: exact, tolerance, soft, auto; padding: all, none."
            )
        if self.pooled not in ("replace", "leave"):
            raise SepMEError(f"There is no way {self.pooled!r} to treat the pooled vector; choose replace or leave.")
        check_numbers(self, RANGES, frozenset({"max_rank", "nearby"}))

    def rtol(self, mode: Mode) -> float:
        """The relative singular value that counts as null in a mode."""
        return EXACT_RTOL if mode == "exact" else self.tolerance


def reduce_rows(rows: Tensor) -> Tensor:
    """The triangular factor R of a QR decomposition: same row space and singular values in at most d_in rows."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def stacked(blocks: Iterable[Tensor]) -> Tensor:
    """Blocks of rows one above the other, reduced to at most d_in rows without ever holding more than a few d_in."""
    pending: list[Tensor] = []
    for block in blocks:
        pending.append(block)
        if sum(len(b) for b in pending) > 4 * block.shape[1]:
            pending = [reduce_rows(torch.cat(pending))]
    return reduce_rows(torch.cat(pending))


class Span:
    """The span of all rows that are read, with coordinates of its own where they are fewer than a wide encoder's channels.

    Nothing is lost: what forbids directions and what carries concepts both lie in it. A concept's directions are found in ``dims``
    dimensions instead of d_in (whose Gram matrix has 7.5 GB for the 30,720 channels of Krea 2).

    Attributes:
        basis: orthonormal columns ``(d_in, dims)`` float64; None where every channel is a coordinate.
    """

    def __init__(self, d_in: int, basis: Tensor | None = None) -> None:
        self.d_in, self.basis = d_in, basis
        self.dims = d_in if basis is None else basis.shape[1]

    @staticmethod
    def of(rows: Tensor) -> Span:
        """Of rows ``(n, d_in)`` float64, n < d_in."""
        return Span(rows.shape[1], torch.linalg.qr(rows.T).Q)

    def coordinates(self, rows: Tensor) -> Tensor:
        """Rows ``(n, d_in)`` as ``(n, dims)``."""
        return rows if self.basis is None else rows @ self.basis

    def channels(self, columns: Tensor) -> Tensor:
        """Columns ``(dims, k)`` as ``(d_in, k)``; orthonormal ones stay so."""
        return columns if self.basis is None else self.basis @ columns


class RowSpace:
    """What all rows added so far forbid, however many they are.

    Attributes:
        gram: ``G = AᵀA`` ``(d_in, d_in)`` float64, a running sum.
        triangle: R of ``A = QR`` (at most d_in rows; A's own singular values, which G knows only down to 1e-8 of the largest),
            or None where only G is asked for.
        count: rows added.
    """

    def __init__(self, d_in: int, device: torch.device, triangle: bool) -> None:
        self.gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.triangle = self.gram[:0] if triangle else None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add rows ``(n, d_in)`` float64."""
        self.gram.addmm_(rows.T, rows)
        self.count += len(rows)
        if self.triangle is not None:
            self.triangle = stacked([self.triangle, rows])


def null_basis(rows: Tensor, rtol: float) -> Tensor:
    """Sp: orthonormal columns ``(d_in, m)`` float64 that ``rows`` (n, d_in) maps to (numerical) zero, ``A Sp = 0``.

    ``‖A v‖ ≤ rtol · σ_max`` for every unit v in their span.
    """
    _, values, basis = torch.linalg.svd(reduce_rows(rows.double()), full_matrices=True)
    rank = int((values > rtol * values[:1]).sum())
    return basis[rank:].T


def null_basis_of_gram(gram: Tensor, rtol: float) -> Tensor:
    """The same from ``AᵀA``, for ``rtol`` well above 1e-8 (what squaring leaves of float64)."""
    values, basis = torch.linalg.eigh(gram)
    return basis[:, values <= rtol**2 * values[-1]]


def concept_basis(tokens: Tensor, null: Tensor, max_rank: int, energy: float) -> Tensor:
    """D ``(d_in, k)`` float64, orthonormal: the leading right singular vectors of ``C Sp``, inside the span of Sp.

    k is the smallest rank that carries ``energy`` of ``‖C Sp‖²``, at most ``max_rank``; directions at rounding level are dropped.
    """
    if null.shape[1] == 0:
        return null
    _, values, right = torch.linalg.svd(reduce_rows(tokens.double() @ null), full_matrices=False)
    k = min(_rank_for(values.square(), max_rank, energy), int((values > 1e-9 * tokens.norm()).sum()))
    return torch.linalg.qr(null @ right[:k].T).Q


def soft_bases(factor: Tensor, tokens: Sequence[Tensor], max_rank: int, energy: float) -> list[Tensor]:
    """D of several concepts at once, each ``(d_in, k)`` float64 orthonormal: the leading generalised eigenvectors v of
    ``CᵀC v = ν (G + εI) v`` (METHOD, section 5), orthonormalised.

    Because G holds ``CᵀC``, they are the generalised eigenvectors against the rest ``G − CᵀC + εI`` too, at ``ν / (1 − ν)``.
    With ``G + εI = L Lᵀ`` and ``M = L⁻¹Cᵀ`` they are ``L⁻ᵀ`` times the left singular vectors of M: one factorisation
    for all concepts and one small eigenproblem, of ``MᵀM``, each.

    Args:
        factor: L, the Cholesky factor ``(d_in, d_in)``.
        tokens: C ``(n, d_in)`` of each concept.
        energy: share of Σν that k directions must carry, if ``max_rank`` allows; directions with less than two thirds of the largest ν
            are left out in any case: others share them.
    """
    reduced = [reduce_rows(c.double()) for c in tokens]
    whitened = torch.linalg.solve_triangular(factor, torch.cat(reduced).T, upper=False).split([len(r) for r in reduced], dim=1)
    leading = []
    for m in whitened:
        values, vectors = torch.linalg.eigh(m.T @ m)  # ascending
        own = int((values > max(1e-12, float(values[-1]) * 2 / 3)).sum())
        k = min(_rank_for(values.flip(0).clamp_min(0), max_rank, energy), own)
        leading.append(m @ vectors[:, len(values) - k :].flip(1))
    vectors = torch.linalg.solve_triangular(factor.T, torch.cat(leading, dim=1), upper=True)
    return [torch.linalg.qr(v / v.norm(dim=0)).Q for v in vectors.split([x.shape[1] for x in leading], dim=1)]


def _rank_for(power: Tensor, max_rank: int, energy: float) -> int:
    """How many of the descending ``power`` carry a share ``energy`` of it, at most ``max_rank``."""
    share = power.cumsum(0) / power.sum().clamp_min(TINY)
    return min(int((share < energy).sum()) + 1, max_rank)


def kept_energy(tokens: Tensor, basis: Tensor) -> float:
    """``‖C D‖² / ‖C‖²``."""
    return float((tokens @ basis).square().sum() / tokens.square().sum().clamp_min(TINY))
