"""Gates of the embedded model's sixteen words, with and without nearby words: what is graded, and what prompts of its world say.

``python benchmarks/gates.py [--nearby 0 200]``. The world's prompts hold one, two or three of its words; no calibration sees them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import product

import torch

from sepme.concepts import Concept, ConceptBook, mentions
from sepme.demo.run import demo_suite
from sepme.demo.world import COLOURS, OBJECT_PROMPTS, OBJECTS, SMALL, STYLE_PROMPTS, STYLES
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import ratios
from sepme.plan.nearby import COUNT
from sepme.plan.planner import Planner

HEAD = "| concept | verdict | others that change | own that slip through | planning, s |\n|---|---|---|---|---|"
KINDS = OBJECTS, STYLES, tuple(COLOURS)


def world(objects: Sequence[str], styles: Sequence[str], colours: Sequence[str]) -> list[str]:
    """Prompts that hold two or three words of these."""
    found = [f"a {s} {c} {o}" for s, c, o in product(styles, colours, objects)]
    found += [f"a {c} {o}" for c, o in product(colours, objects)] + [f"a {o}, {s} style" for s, o in product(styles, objects)]
    found += [f"a drawing of a {c} {o} in {s} style" for s, c, o in product(styles, colours, objects)]
    return found + [f"{s} style, {c}" for s, c in product(styles, colours)]


def sets_of(name: str) -> tuple[list[str], list[str]]:
    """Prompts without a word, and with it."""
    singles = [t.format(w) for t in (*OBJECT_PROMPTS, *STYLE_PROMPTS) for w in SMALL.words if w != name]
    own = world(*((name,) if name in kind else kind for kind in KINDS))
    return singles + world(*([w for w in kind if w != name] for kind in KINDS)), [p for p in own if mentions(p, name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nearby", type=int, nargs="+", default=[0, COUNT])
    given = parser.parse_args()
    host = DiffusersHost.load("demo")
    suite = demo_suite().book()
    alone = {name: ConceptBook((Concept(name),)) for name in SMALL.words}
    together = {c.name: suite for c in suite.concepts}
    for label, books in (("alone", alone), ("the demo's twelve together", together)):
        for nearby in given.nearby:
            print(f"\n{label}, {nearby} nearby words\n\n{HEAD}")
            planners: dict[int, Planner] = {}
            for name, book in books.items():
                started = time.process_time()
                if id(book) not in planners:
                    planners[id(book)] = Planner(host, book, PlanOptions(nearby=nearby))
                planned = planners[id(book)].plan_all()[name]
                seconds = time.process_time() - started
                others, own = ((ratios(host.encode(prompts).context, planned.down) > planned.gate) for prompts in sets_of(name))
                verdict = planned.certificate.verdict(planned.gate)
                changed, slipped = f"{int(others.sum())} of {len(others)}", f"{int((~own).sum())} of {len(own)}"
                print(f"| {name} | {verdict} | {changed} | {slipped} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
