"""How many of some prompts or words do what they should not, and which of them most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..files import number, text

NAMED = 5


@dataclass(frozen=True)
class Tally:
    """``count`` of ``of``; the worst ones named, the worst first."""

    count: int = 0
    of: int = 0
    worst: tuple[str, ...] = ()

    @staticmethod
    def above(excess: Mapping[str, float]) -> Tally:
        """Of things by how far they are beyond what is right: those above 0."""
        wrong = sorted((name for name, value in excess.items() if value > 0), key=lambda name: -excess[name])
        return Tally(len(wrong), len(excess), tuple(wrong[:NAMED]))

    @property
    def share(self) -> float:
        """``count / of``, 0 of nothing."""
        return self.count / max(self.of, 1)

    @staticmethod
    def from_json(data: Mapping[str, Any] | None) -> Tally | None:
        """Read it from a header; None where there is none."""
        if data is None:
            return None
        return Tally(number(data["count"]), number(data["of"]), tuple(map(text, data["worst"])))
