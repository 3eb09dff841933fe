"""Where a concept may be edited: token matrices -> subspace D, row gate and certificate. All planning is float64.

A concept i may change keys and values only along ``D_i`` (``d_in x k``, orthonormal) with ``A_i D_i = 0``, where ``A_i``
stacks the tokens of everything else that is known (Eq. 9-10 of arXiv 2402.05947; the concept subspace is this project's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from torch import Tensor

from .concepts import Concept, ConceptBook, mentions
from .errors import SepMEError
from .pooled import Pooled, leakage, residual
from .protocols import Encoding, TextEncoder

Mode = Literal["exact", "tolerance"]
Padding = Literal["all", "none"]
EXACT_RTOL = 1e-6
CHUNK = 256  # prompts encoded at once


@dataclass(frozen=True)
class PlanOptions:
    """How directions are chosen.

    Attributes:
        mode: ``exact`` (numerical null space) or ``tolerance`` (directions of A under a relative singular value count as null).
        tolerance: that relative singular value.
        max_rank: cap on k.
        energy: share of the concept's energy in the null space that k directions must carry, if the cap allows.
        min_kept_energy: refuse when less than this share of the concept's energy lies along D.
        padding: whether tokens after the prompt's end constrain and carry concepts (``all``) or not (``none``).
        pooled: whether the pooled vector, where the model has one, is replaced along the concept or left as it is.
    """

    mode: Mode = "tolerance"
    tolerance: float = 0.03
    max_rank: int = 8
    energy: float = 0.999
    min_kept_energy: float = 1e-4
    padding: Padding = "all"
    pooled: Literal["replace", "leave"] = "replace"

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "tolerance") or self.padding not in ("all", "none"):
            raise SepMEError(
                f"Unknown mode {self.mode!r} or padding {self.padding!r}; modes are exact and tolerance, padding is all or none."
            )
        if self.pooled not in ("replace", "leave"):
            raise SepMEError(f"There is no way {self.pooled!r} to treat the pooled vector; choose replace or leave.")
        if not (0 < self.tolerance < 1 and self.max_rank >= 1 and 0 < self.energy <= 1):
            raise SepMEError("tolerance and energy must lie between 0 and 1, and max_rank must be at least 1.")

    @property
    def rtol(self) -> float:
        return EXACT_RTOL if self.mode == "exact" else self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What is known about a subspace, measured on real tokens.

    Attributes:
        leakage_linear: worst ``‖c D‖ / ‖c‖`` over tokens, by known concept or kind of prompt.
        leakage_gated: the same, 0 where the gate stays closed.
        kept_energy: ``‖C D‖² / ‖C‖²``, C the tokens of the concept's prompts.
        gate_low: worst ratio of what must stay untouched. gate_high: smallest ratio of the concept's own prompts.
        false_touch_rate: share of ordinary prompts held out from calibration that pass the gate.
        rank: k. null_dims: directions left for this concept (columns of Sp).
        pooled: of models with a pooled vector: ``mode`` (replaced or left), ``rank``, ``residual`` and ``leakage`` (see ``pooled.py``).
    """

    leakage_linear: dict[str, float]
    leakage_gated: dict[str, float]
    kept_energy: float
    gate_low: float
    gate_high: float
    false_touch_rate: float
    rank: int
    null_dims: int
    pooled: dict[str, Any] | None = None

    @property
    def gate_overlap(self) -> float:
        """By how much prompts that must stay untouched reach into the concept's own; 0 when the gate separates them."""
        return max(0.0, self.gate_low - self.gate_high)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gate_overlap": self.gate_overlap}


@dataclass(frozen=True)
class Subspace:
    """Directions of one concept: ``down`` ``(k, d_in)`` float32, orthonormal rows (Dᵀ); gate threshold γ; certificate; pooled part."""

    concept: Concept
    down: Tensor
    gate: float
    certificate: Certificate
    options: PlanOptions = field(default_factory=PlanOptions)
    pooled: Pooled | None = None


def ratios(context: Tensor, down: Tensor) -> Tensor:
    """Gate statistic ``max_t ‖c_t D‖ / ‖c_t‖`` of each row, ``(rows,)`` float32, of context ``(rows, tokens, d_in)``."""
    context = context.float()
    projected = (context @ down.to(context).T).norm(dim=-1)
    return (projected / context.norm(dim=-1).clamp_min(1e-12)).amax(dim=-1)


@cache
def ordinary_prompts() -> tuple[str, ...]:
    """The shipped corpus of ordinary prompts; even lines calibrate gates, odd ones measure false touches."""
    text = (resources.files(__package__) / "data" / "ordinary_prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def encode(encoder: TextEncoder, prompts: Sequence[str]) -> Encoding:
    """Encode many prompts on the CPU, a few hundred at a time; rows of fewer 77-token chunks are repeated to the longest's length.

    Raises:
        SepMEError: the encoder returned NaN or infinite values.
    """
    parts = [encoder.encode(list(prompts[i : i + CHUNK])).to("cpu") for i in range(0, len(prompts), CHUNK)]
    longest = max(p.context.shape[1] for p in parts)
    contexts, masks = [], []
    for part in parts:
        repeat = longest // part.context.shape[1]
        if part.context.shape[1] * repeat != longest:
            raise SepMEError("The text encoder returned rows of incompatible lengths; prompts must fill whole chunks of tokens.")
        contexts.append(part.context.detach().repeat(1, repeat, 1))
        masks.append(part.mask.repeat(1, repeat))
    context = torch.cat(contexts)
    pooled = [p.pooled.detach() for p in parts if p.pooled is not None]
    if not all(v.isfinite().all() for v in (context, *pooled)):
        raise SepMEError("The text encoder returned NaN or infinite values; check the checkpoint, or run the encoder in float32.")
    return Encoding(context, torch.cat(masks), torch.cat(pooled) if pooled else None)


def _rows(encoding: Encoding, padding: Padding) -> Tensor:
    """Token rows ``(n, d_in)`` float64."""
    context = encoding.context.double()
    return context.reshape(-1, context.shape[-1]) if padding == "all" else context[encoding.mask]


def _reduce(rows: Tensor) -> Tensor:
    """The triangular factor R of a QR decomposition: same row space and singular values in at most d_in rows."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def null_basis(rows: Tensor, rtol: float) -> Tensor:
    """Sp: orthonormal columns ``(d_in, m)`` float64 that ``rows`` (n, d_in) maps to (numerical) zero, ``A Sp = 0``.

    ``‖A v‖ ≤ rtol · σ_max`` for every unit v in their span.
    """
    _, values, basis = torch.linalg.svd(_reduce(rows.double()), full_matrices=True)
    rank = int((values > rtol * values[:1]).sum())
    return basis[rank:].T


def concept_basis(tokens: Tensor, null: Tensor, max_rank: int, energy: float) -> Tensor:
    """D ``(d_in, k)`` float64, orthonormal: the leading right singular vectors of ``C Sp``, inside the span of Sp.

    k is the smallest rank that carries ``energy`` of ``‖C Sp‖²``, at most ``max_rank``; directions at rounding level are dropped.
    """
    if null.shape[1] == 0:
        return null
    _, values, right = torch.linalg.svd(tokens.double() @ null, full_matrices=False)
    power = values.square()
    share = power.cumsum(0) / power.sum().clamp_min(1e-300)
    k = min(int((share < energy).sum()) + 1, max_rank, int((values > 1e-9 * tokens.norm()).sum()))
    return torch.linalg.qr(null @ right[:k].T).Q


class Planner:
    """Encodes a book's prompts once and plans a subspace for each of its concepts.

    Args:
        encoder: the host's text encoder.
        book: every known concept (old and new) and the preserve list.
        ordinary: calibration corpus; the shipped one by default.
    """

    def __init__(
        self, encoder: TextEncoder, book: ConceptBook, options: PlanOptions | None = None, ordinary: Sequence[str] | None = None
    ) -> None:
        self.book, self.options = book, options or PlanOptions()
        self.ordinary = tuple(ordinary_prompts() if ordinary is None else ordinary)
        self.empty = encode(encoder, [""])
        self.encodings = {c.name: encode(encoder, c.prompts) for c in book.concepts}
        self.anchors = {c.name: encode(encoder, [c.anchor]) for c in book.concepts}
        self.preserved = encode(encoder, book.preserve) if book.preserve else None
        self.ordinary_context = encode(encoder, self.ordinary).context if self.ordinary else None
        self._check_preserved()
        fixed = [self.empty] + ([self.preserved] if self.preserved is not None else [])
        self._fixed = torch.cat([_rows(e, self.options.padding) for e in fixed])
        self._reduced = {n: _reduce(_rows(e, self.options.padding)) for n, e in self.encodings.items()}

    def _check_preserved(self) -> None:
        if self.preserved is None:
            return
        for name, encoding in self.encodings.items():
            for row, prompt in zip(encoding.context, self.book[name].prompts, strict=True):
                same = [torch.equal(row, kept) for kept in self.preserved.context]
                if any(same):
                    raise SepMEError(
                        f"The prompt {prompt!r} of concept {name!r} reads the same to the text encoder as the preserved prompt "
                        f"{self.book.preserve[same.index(True)]!r}; it cannot be erased and kept at once, so remove one."
                    )

    def tokens(self, name: str) -> tuple[Tensor, Tensor]:
        """Tokens C ``(n, d_in)`` of a concept's prompts and its anchor's C*, aligned by position; float64."""
        own, anchor = self.encodings[name], self.anchors[name].context
        anchor = anchor.repeat(1, own.context.shape[1] // anchor.shape[1], 1).expand_as(own.context)
        return _rows(own, self.options.padding), _rows(Encoding(anchor, own.mask), self.options.padding)

    def _basis(self, name: str, others: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """(Sp, D, kept energy) of a concept against the empty prompt, the preserve list and ``others``."""
        null = null_basis(torch.cat([self._fixed, *(self._reduced[n] for n in others)]), self.options.rtol)
        tokens = _rows(self.encodings[name], self.options.padding)
        basis = concept_basis(tokens, null, self.options.max_rank, self.options.energy)
        return null, basis, float((tokens @ basis).square().sum() / tokens.square().sum().clamp_min(1e-300))

    def plan(self, name: str) -> Subspace:
        """Plan one concept's subspace against all others of the book.

        Raises:
            SepMEError: no room is left; the message says how many concepts fit.
        """
        concept = self.book[name]
        name = concept.name
        others = [c.name for c in self.book.concepts if c.name != name]
        null, basis, kept = self._basis(name, others)
        if kept < self.options.min_kept_energy or basis.shape[1] == 0:
            raise SepMEError(self._refusal(name, others, kept))
        down = basis.T.float().contiguous()
        gate, certificate = self._calibrate(concept, down, kept, null.shape[1])
        pooled, facts = self._plan_pooled(name, others)
        return Subspace(concept, down, gate, replace(certificate, pooled=facts), self.options, pooled)

    def _plan_pooled(self, name: str, others: Sequence[str]) -> tuple[Pooled | None, dict[str, Any] | None]:
        """Directions of the pooled vector, chosen as those of the tokens are, and what is known about them."""
        own, anchor = self.encodings[name].pooled, self.anchors[name].pooled
        if own is None or anchor is None:
            return None, None
        fixed = [self.empty.pooled, self.preserved.pooled if self.preserved is not None else None]
        rows = torch.cat([p for p in (*fixed, *(self.encodings[n].pooled for n in others)) if p is not None]).double()
        part = None
        if self.options.pooled == "replace":
            down = concept_basis(own.double(), null_basis(rows, self.options.rtol), self.options.max_rank, self.options.energy).T
            part = Pooled(down.float().contiguous(), (down @ anchor[0].double()).float()) if len(down) else None
        facts = {"mode": "left" if part is None else "replaced", "residual": residual(part, own, anchor)}
        return part, facts | ({"rank": len(part.down), "leakage": leakage(part, rows)} if part else {})

    def _refusal(self, name: str, others: list[str], kept: float) -> str:
        def fits(count: int) -> bool:
            return self._basis(name, others[:count])[2] >= self.options.min_kept_energy

        low, high = -1, len(others)  # fits(low), not fits(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        room = f"{low + 1} concepts fit" if low >= 0 else "not even one concept fits beside the preserve list"
        if self.options.mode == "exact":
            advice = "use mode tolerance, or fewer concepts or prompts"
        else:
            advice = "raise the tolerance, or use fewer concepts or prompts"
        return (
            f"No room is left for {name!r}: {kept:.1e} of its energy is free of the others ({room} in mode {self.options.mode}); {advice}."
        )

    def _calibrate(self, concept: Concept, down: Tensor, kept: float, null_dims: int) -> tuple[float, Certificate]:
        own = self._statistic(self.encodings[concept.name].context, down, torch.minimum)
        high = float(own.min())
        known = {n: e.context for n, e in self.encodings.items() if n != concept.name and not self._entangled(concept, n)}
        groups = known | {"(empty prompt)": self.empty.context}
        if self.preserved is not None:
            groups["(preserved prompts)"] = self.preserved.context
        leakage = {n: float(self._statistic(c, down, torch.maximum).max()) for n, c in groups.items()}
        low = max(leakage.values())
        ordinary = torch.zeros(0)
        if self.ordinary_context is not None:
            strangers = [i for i, p in enumerate(self.ordinary) if not mentions(p, concept.name)]
            ordinary = self._statistic(self.ordinary_context, down, torch.maximum)[strangers]
        calibration, held_out = ordinary[0::2], ordinary[1::2]
        soft_low = max([low, *calibration.tolist()])
        gate = _threshold(low, soft_low, high)
        rate = float((held_out > gate).float().mean()) if len(held_out) else 0.0
        gated = {n: (v if v > gate else 0.0) for n, v in leakage.items()}
        return gate, Certificate(leakage, gated, kept, soft_low, high, rate, down.shape[0], null_dims)

    def _entangled(self, concept: Concept, other: str) -> bool:
        """Whether the other concept's name contains this one's words, so that its prompts carry this concept."""
        return mentions(other, concept.name)

    @staticmethod
    def _statistic(context: Tensor, down: Tensor, worse: Any) -> Tensor:
        """Gate statistic, the worse of the context as it is and rounded as half precision encoders round it."""
        result = ratios(context, down)
        for dtype in (torch.float16, torch.bfloat16):
            result = worse(result, ratios(context.to(dtype), down))
        return result


def _threshold(low: float, soft_low: float, high: float) -> float:
    """γ: the geometric mean of what must stay shut and what must open; known and preserved prompts come first when they overlap."""
    floor = max(low * 1.02, 1e-6)
    if high <= floor:
        return floor
    if high <= soft_low:
        return max(floor, high * 0.98)
    return (max(soft_low, 1e-3 * high) * high) ** 0.5


def leakage_matrix(downs: Mapping[str, Tensor], contexts: Mapping[str, Tensor]) -> Tensor:
    """``(len(downs), len(contexts))``: worst gate statistic of delta i on the prompts of j."""
    return torch.stack([torch.stack([ratios(c, d).max() for c in contexts.values()]) for d in downs.values()])
