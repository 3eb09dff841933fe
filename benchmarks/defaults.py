"""What the defaults of planning and training are worth on the embedded model: one of them changed at a time.

``python benchmarks/defaults.py [--images 4] [--only WORD...] [--alone]``: a table, row by row. The suite ``demo``'s six concepts, planned
together with nearby words, edits of the layers, the gate on. Half an hour on one core. With ``--alone`` each concept is planned by itself,
so that the others are neighbours that nobody named.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from sepme.concepts import ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.erasers import Separable
from sepme.evaluate.measure import figures
from sepme.evaluate.sampler import Sampler
from sepme.evaluate.suite import Suite
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.directions import PlanOptions
from sepme.plan.nearby import COUNT
from sepme.plan.planner import Planner
from sepme.plan.vocabulary import Vocabulary
from sepme.train import TrainOptions, make_deltas

FOUND = "found"  # the broader thing that a name means
CLOSED: list[tuple[str, dict[str, Any]]] = [  # what differs from the defaults, in closed form
    ("the defaults", {}),
    *((f"tolerance {t}", {"tolerance": t}) for t in (0.003, 0.012, 0.03)),
    *((f"mode soft, epsilon {e}", {"mode": "soft", "epsilon": e}) for e in (0.1, 0.3, 1.0)),
    *((f"energy {e}", {"energy": e}) for e in (0.5, 0.99)),
    *((f"rank at most {k}", {"max_rank": k}) for k in (1, 2, 4, 16)),
    ("padding none", {"padding": "none"}),
    ("nearby words none", {"nearby": 0}),
    ("anchor found", {"anchor": FOUND}),
    ("anchor a picture", {"anchor": "a picture"}),
    ("values alone", {"values_only": True}),
]
TRAINED: list[tuple[str, dict[str, Any]]] = [  # by G-CiRs
    ("the defaults", {}),
    ("no warm start", {"warm_start": False}),
    ("values alone", {"values_only": True}),
    *((f"tolerance {t}", {"tolerance": t}) for t in (0.003, 0.012)),
    ("mode soft", {"mode": "soft"}),
    *((f"rank at most {k}", {"max_rank": k}) for k in (2, 16)),
    ("padding none", {"padding": "none"}),
    ("anchor found", {"anchor": FOUND}),
]
FIGURES = (
    "erased_accuracy", "erased_accuracy_unseen", "erased_accuracy_all_on", "erased_accuracy_weighted", "cooccurring_accuracy",
    "untouched_bit_identical", "neighbour_bit_identical", "restored_bit_identical",
)  # fmt: skip
COLUMNS = (
    "objective", "changed", "erased", "unseen", "all on", "weight 1.4", "co-occurring", "others: same bits", "neighbours: same bits",
    "given back: same bits", "nearby words that change", "own slip through", "graded safe, nearly", "rank", "kB", "s",
)  # fmt: skip
PLAN = {"mode", "tolerance", "epsilon", "energy", "max_rank", "padding", "nearby"}


class Plans:
    """Planners of the suite's concepts by what differs, of all together or of each alone; prompts are read once where they can be."""

    def __init__(self, host: DiffusersHost, book: ConceptBook, alone: bool) -> None:
        self.host, self.read = host, dict[tuple[Any, ...], Planner]()
        self.books = [replace(book, concepts=(c,)) for c in book.concepts] if alone else [book]

    def get(self, changed: dict[str, Any]) -> list[Planner]:
        options = PlanOptions(**{"nearby": COUNT} | {k: v for k, v in changed.items() if k in PLAN})
        return [self._planner(i, options, changed.get("anchor")).with_options(options) for i in range(len(self.books))]

    def _planner(self, book: int, options: PlanOptions, anchor: str | None) -> Planner:
        key = book, options.padding, options.nearby, anchor
        if key not in self.read:
            words, concepts = Vocabulary.of(self.host), self.books[book].concepts
            anchors = {c.name: words.anchor(self.host, c.name) if anchor == FOUND else anchor or "" for c in concepts}
            anchored = tuple(replace(c, anchor=anchors[c.name]) for c in concepts)
            self.read[key] = Planner(self.host, replace(self.books[book], concepts=anchored), options)
        return self.read[key]


def row(sampler: Sampler, plans: Plans, objective: str, changed: dict[str, Any]) -> list[str]:
    """The figures of one change."""
    options = TrainOptions.for_mode(objective=objective, **{k: v for k, v in changed.items() if k not in PLAN | {"anchor"}})
    planners = plans.get(changed)
    for planner in planners:
        planner.plan_all()
    started = time.process_time()
    deltas: list[ConceptDelta] = [d for p in planners for d in make_deltas(p, [c.name for c in p.book.concepts], plans.host, options)]
    seconds = time.process_time() - started
    eraser = Separable(deltas)
    found, _ = figures(sampler, eraser, True, 1)
    certificates = [d.certificate for d in deltas]
    tallies = [[t for c in certificates if (t := getattr(c, key)) is not None] for key in ("collateral", "misses")]
    wrong = [f"{sum(t.count for t in some)} of {sum(t.of for t in some)}" if some else "" for some in tallies]
    grades = [d.grade for d in deltas]
    known = [f"{found[key]:.3f}" for key in FIGURES]
    graded = f"{grades.count('good')}, {grades.count('fair')}"
    return [*known, *wrong, graded, f"{fmean(d.rank for d in deltas):.1f}", f"{eraser.bytes / 1000:.0f}", f"{seconds:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[""], help="changes that hold one of these words")
    parser.add_argument("--alone", action="store_true", help="each concept is planned by itself")
    given = parser.parse_args()
    torch.set_num_threads(1)
    suite = replace(Suite.load("demo"), images=given.images)
    host = DiffusersHost.load("demo")
    sampler, plans = Sampler(host, EmbeddedClassifier(), suite, lambda: None), Plans(host, suite.book(), given.alone)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for objective, changes in (("closed-form", CLOSED), ("gcirs", TRAINED)):
        for label, changed in changes:
            if any(word in label for word in given.only):
                print("| " + " | ".join([objective, label, *row(sampler, plans, objective, changed)]) + " |", flush=True)


if __name__ == "__main__":
    main()
