"""The row gate: its statistic, its threshold, and the certificate that says what it was measured on (METHOD, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..files import number, text
from .tally import Tally

# Rounding c to bfloat16 moves it by at most 2⁻⁹ ‖c‖, and so the statistic by at most 2⁻⁸; float16 is finer.
ROUNDING = 2.0**-8
HALVES = (torch.float16, torch.bfloat16)
BLOCK = 1 << 24  # elements of H held at once
VERDICTS = {"good": "Safe", "fair": "Nearly safe", "poor": "Not safe", "unknown": "Not measured"}
TOLERABLE = 0.01  # share of nearby words and of own prompts up to which a gate is nearly safe
ROOM = 1.2  # how far above what must stay shut a prompt has to be for the gate to be lowered for it
CORPUS = 1 << 27  # elements of the ordinary prompts' contexts


@dataclass(frozen=True)
class Certificate:
    """What is known about a subspace, measured on real tokens.

    Attributes:
        leakage_linear: worst ``‖c D‖ / ‖c‖`` over tokens, by known concept or kind of prompt.
        leakage_gated: the same, 0 where the gate stays closed.
        kept_energy: ``‖C D‖² / ‖C‖²``, C the tokens of the concept's prompts.
        gate_low: worst ratio of what must stay untouched.
        gate_high: smallest ratio of the concept's own prompts.
            All are the worst that rounding to half precision makes of them.
        false_touch_rate: share of ordinary prompts held out from calibration that pass the gate.
        rank: k.
        null_dims: directions left for this concept (columns of Sp; in mode soft, directions that everything together
            leaves under the tolerance). Both are whole numbers.
        mode: how D was chosen, ``auto`` resolved.
        pooled: of models with a pooled vector: ``mode`` (replaced or left), ``rank``, ``residual`` and ``leakage`` (see ``pooled.py``).
        collateral: words near the concept that pass the gate in some prompt.
        misses: its own prompts, in other templates and beside other things, that do not. Both are of prompts that nothing was planned
            with; None where nearby words were not looked at.
    """

    leakage_linear: dict[str, float]
    leakage_gated: dict[str, float]
    kept_energy: float
    gate_low: float
    gate_high: float
    false_touch_rate: float
    rank: float
    null_dims: float
    mode: str = "tolerance"
    pooled: dict[str, Any] | None = None
    collateral: Tally | None = None
    misses: Tally | None = None

    @property
    def gate_overlap(self) -> float:
        """By how much prompts that must stay untouched reach into the concept's own; 0 when the gate separates them."""
        return max(self.gate_low - self.gate_high, 0.0)

    @property
    def room(self) -> float:
        """What must open over what must stay shut: above 1 a gate fits between them."""
        return self.gate_high / max(self.gate_low, 1e-12)

    @property
    def worst_leakage(self) -> float:
        """The worst of ``leakage_linear``: what the strongest known prompt feels of a delta without its gate."""
        return max(self.leakage_linear.values(), default=0.0)

    @property
    def worst_leakage_gated(self) -> float:
        """The worst of ``leakage_gated``: 0 where the gate spares every known prompt."""
        return max(self.leakage_gated.values(), default=0.0)

    def grade(self, gate: float) -> str:
        """The certificate in one word, for a gate of this threshold.

        ``poor``: prompts that must not change pass the gate, or the concept's own do not; of nearby words, or of its own prompts that
        nothing was planned with, more than one and more than :data:`TOLERABLE`. ``fair``: fewer of those, or ordinary prompts pass it, or
        it has little room: less than a tenth between what passes and what does not. ``good``: none of these. ``unknown``: no figures.
        """
        if any(map(isnan, (gate, self.gate_low, self.gate_high))):
            return "unknown"
        if any(self.leakage_gated.values()) or gate >= self.gate_high:
            return "poor"
        wrong = [t for t in (self.collateral, self.misses) if t is not None and t.count > 0]
        if any(t.count > 1 and t.share > TOLERABLE for t in wrong):
            return "poor"
        return "fair" if wrong or self.false_touch_rate > 0 or self.gate_high - self.gate_low < 0.1 * self.gate_high else "good"

    def verdict(self, gate: float) -> str:
        """The grade in a sentence, with what it comes from."""
        grade = self.grade(gate)
        word = VERDICTS[grade]
        if grade == "unknown" or self.collateral is None or self.misses is None:
            return word if grade == "unknown" else f"{word} by known and ordinary prompts; nearby words were not measured."
        near, own = self.collateral, self.misses
        said = [f"0 of {near.of} nearby words change"]
        if near.count:
            verb = "changes" if near.count == 1 else "change"
            more = f" and {near.count - len(near.worst)} more" if near.count > len(near.worst) else ""
            said = [f"{', '.join(near.worst)}{more} {verb}; add {'it' if near.count == 1 else 'them'} to the preserve list"]
        if own.count:
            said.append(f"{own.count} of {own.of} prompts with the concept slip through, as {own.worst[0]!r}")
        if self.false_touch_rate > 0:
            said.append(f"{self.false_touch_rate:.1%} of ordinary prompts change")
        return f"{word}: {'; '.join(said)}."

    def to_json(self) -> dict[str, Any]:
        """As it stands in files; figures that are not known are None."""
        facts = asdict(self) | {"gate_overlap": self.gate_overlap}
        return {key: None if isinstance(value, float) and isnan(value) else value for key, value in facts.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Certificate:
        """The certificate that stands in a file; figures that it does not say become NaN.

        Raises:
            TypeError, ValueError, AttributeError, KeyError: something is of another type than it should be.
        """
        linear, gated = ({n: number(v) for n, v in data.get(f"leakage_{kind}", {}).items()} for kind in ("linear", "gated"))
        names = ("kept_energy", "gate_low", "gate_high", "false_touch_rate", "rank", "null_dims")
        pooled = data.get("pooled")
        if pooled is not None:
            text(pooled["mode"]), number(pooled["residual"])
        figures = {name: number(data.get(name, nan)) for name in names}
        collateral, misses = (Tally.from_json(data.get(name)) for name in ("collateral", "misses"))
        return Certificate(linear, gated, **figures, mode=text(data.get("mode", "?")), pooled=pooled, collateral=collateral, misses=misses)


@cache
def ordinary_prompts() -> tuple[str, ...]:
    """The shipped corpus of ordinary prompts; even lines calibrate gates, odd ones measure false touches."""
    text = (Path(__file__).parents[1] / "data" / "ordinary_prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def affordable(context: Tensor) -> tuple[str, ...]:
    """Of the ordinary prompts as many as this text encoder reads in a reasonable time and space: all of them for CLIP.

    They are taken evenly and in pairs, so that each half is a part of the half of the whole.

    Args:
        context: of some prompt ``(1, tokens, d_in)``.
    """
    prompts = ordinary_prompts()
    pairs = min(len(prompts) // 2, max(32, CORPUS // (2 * context[0].numel())))
    chosen = (2 * (i * (len(prompts) // 2) // pairs) for i in range(pairs))
    return tuple(prompts[i + j] for i in chosen for j in (0, 1))


def side_by_side(downs: Sequence[Tensor]) -> Tensor:
    """``Dᵀ`` ``(k, d_in)`` of several deltas as one ``(largest k, deltas, d_in)``, zeros where a delta has fewer directions.

    In this order the sum over k of :func:`statistics` runs over a long contiguous last dimension.
    """
    return pad_sequence(list(downs))


def statistics(context: Tensor, downs: Tensor) -> Tensor:
    """Gate statistic ``max_t ‖c_t D‖ / ‖c_t‖`` of each row under each delta, ``(rows, deltas)`` float32.

    Args:
        context: ``(rows, tokens, d_in)``.
        downs: of :func:`side_by_side`.
    """
    context = context.float()
    d = downs.to(context)
    ranks, deltas, d_in = d.shape
    rows = max(1, BLOCK // (context.shape[1] * ranks * deltas))
    parts = []
    for c in context.split(rows):
        h = (c.reshape(-1, d_in) @ d.reshape(-1, d_in).T).view(*c.shape[:2], ranks, deltas)
        parts.append((h.square_().sum(dim=2).sqrt_() / c.norm(dim=-1, keepdim=True).clamp_min(1e-12)).amax(dim=1))
    return torch.cat(parts)


def extremes(context: Tensor, downs: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
    """The largest and smallest statistic ``(rows, deltas)`` that rounding the context to half precision leads to.

    Args:
        measured: round and measure (three times the work), or else bound.
    """
    values = statistics(context, downs)
    if not measured:
        return values + ROUNDING, values - ROUNDING
    every = torch.stack([values, *(statistics(context.to(d), downs) for d in HALVES)])
    return every.amax(dim=0), every.amin(dim=0)


def ratios(context: Tensor, down: Tensor) -> Tensor:
    """Gate statistic of each row under one delta, ``(rows,)`` float32, of context ``(rows, tokens, d_in)``."""
    return statistics(context, down[:, None])[:, 0]


def threshold(low: float, soft_low: float, high: float) -> float:
    """γ: the geometric mean of what must stay shut and what must open; known and preserved prompts come first when they overlap."""
    floor = max(low * 1.02, 1e-6)
    if high <= floor:
        return floor
    if high <= soft_low:
        return max(floor, high * 0.98)
    return (max(soft_low, 1e-3 * high) * high) ** 0.5


def widened(gate: float, soft_low: float, high: float, beside: Sequence[float]) -> float:
    """γ lowered for prompts of the concept beside other things (their statistics), as far as what must stay shut leaves room."""
    reached = min([high, *(value for value in beside if value > ROOM * soft_low)])
    return gate if high <= soft_low else min(gate, (max(soft_low, 1e-3 * high) * reached) ** 0.5)


def certify(
    leakage: dict[str, float],
    high: float,
    calibration: Sequence[float],
    held_out: Sequence[float],
    energy: float,
    rank: int,
    null_dims: int,
    mode: str,
    gate: float | None = None,
    beside: Sequence[float] = (),
) -> tuple[float, Certificate]:
    """γ (calibrated unless given) and the certificate.

    Args:
        leakage: worst statistic of what must never be touched, by name.
        high: smallest of the concept's own prompts.
        calibration, held_out: of ordinary prompts, and of words near the concept; they may be empty.
        beside: of the concept's name beside other things.
    """
    low = max(leakage.values())
    soft_low = max([low, *calibration])
    if gate is None:
        gate = widened(threshold(low, soft_low, high), soft_low, high, beside)
    touched = [value > gate for value in held_out]
    rate = sum(touched) / len(touched) if touched else 0.0
    gated = {n: (v if v > gate else 0.0) for n, v in leakage.items()}
    return gate, Certificate(leakage, gated, energy, soft_low, high, rate, rank, null_dims, mode)


def leakage_matrix(downs: Mapping[str, Tensor], contexts: Mapping[str, Tensor]) -> Tensor:
    """``(len(downs), len(contexts))``: worst gate statistic of delta i on the prompts of j."""
    return torch.stack([torch.stack([ratios(c, d).max() for c in contexts.values()]) for d in downs.values()])
