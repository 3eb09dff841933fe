"""How many concepts an encoder has room for: mode, leakage and kept energy against N (METHOD, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from ..checks import check_number
from ..concepts import Concept, ConceptBook, mentions, normalised
from ..errors import SepMEError
from ..model.protocols import TextEncoder
from ..progress import OnProgress, silent
from .directions import MANY, PlanOptions
from .planner import Planner

COUNTS = (10, 30, 100, 1000)


@dataclass(frozen=True)
class CapacityRow:
    """One N: figures over the N concepts, of each concept's worst leakage on everything else that is known.

    Attributes:
        mode: how directions were planned; of ``auto``, what it picked.
        gate_open: share of concepts whose own prompts all pass their gate.
        dims_left: directions left for the concept that has the fewest (in mode soft: left by everything together).
    """

    concepts: int
    mode: str
    leakage_linear_worst: float
    leakage_linear_median: float
    leakage_gated_worst: float
    leakage_gated_median: float
    kept_energy_min: float
    kept_energy_median: float
    gate_open: float
    dims_left: int

    def to_json(self) -> dict[str, Any]:
        """The row for ``--json``."""
        return asdict(self)


@cache
def shipped_names() -> tuple[str, ...]:
    """A thousand ordinary things and made-up people, none of them part of another."""
    return tuple((Path(__file__).parents[1] / "data" / "names.txt").read_text(encoding="utf-8").split("\n")[:-1])


def extended(book: ConceptBook, count: int) -> ConceptBook:
    """The book's first ``count`` concepts; shipped names, each with itself as its only prompt, make up what it lacks.

    Raises:
        SepMEError: there are not so many names.
    """
    names = [c.name for c in book.concepts]
    preserved = {normalised(p) for p in book.preserve}
    free = [n for n in shipped_names() if normalised(n) not in preserved and not any(mentions(n, own) or mentions(own, n) for own in names)]
    concepts = (*book.concepts, *(Concept(n, (n,)) for n in free))[:count]
    if len(concepts) < count:
        raise SepMEError(f"There are names for {len(concepts)} concepts, not for {count}; choose a smaller number or a longer book.")
    return replace(book, concepts=concepts)


def capacity(
    encoder: TextEncoder,
    book: ConceptBook,
    counts: Sequence[int] = COUNTS,
    options: PlanOptions | None = None,
    on_progress: OnProgress = silent,
) -> list[CapacityRow]:
    """Plan the first N concepts for each N: in mode ``auto``, and from :data:`MANY` on in mode ``soft``, as training does by default."""
    for count in counts:
        check_number("count", count, 1, 10**6, whole=True)
    rows = []
    for count in counts:

        def progress(what: str, done: int, total: int, count: int = count) -> None:
            on_progress(f"{count} concepts: {what}", done, total)

        usual = PlanOptions(mode="soft" if count >= MANY else "auto")
        planner = Planner(encoder, extended(book, count), options or usual, on_progress=progress)
        certificates = [s.certificate for s in planner.plan_all().values()]
        linear = [c.worst_leakage for c in certificates]
        gated = [c.worst_leakage_gated for c in certificates]
        energies = [c.kept_energy for c in certificates]
        rows.append(
            CapacityRow(
                concepts=count,
                mode=planner.mode,
                leakage_linear_worst=max(linear),
                leakage_linear_median=median(linear),
                leakage_gated_worst=max(gated),
                leakage_gated_median=median(gated),
                kept_energy_min=min(energies),
                kept_energy_median=median(energies),
                gate_open=sum(s.certificate.gate_high > s.gate for s in planner.plan_all().values()) / count,
                dims_left=int(min(c.null_dims for c in certificates)),
            )
        )
    return rows
