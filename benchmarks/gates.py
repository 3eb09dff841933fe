"""Gates of the embedded model's words, with and without nearby words: what is graded, and what prompts of its world say.

``python benchmarks/gates.py [--nearby 0 200] [--words 24]``. Prompts of its world hold one, two or three of its words;
no calibration sees them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import product, zip_longest

import torch

from sepme.concepts import Concept, ConceptBook, mentions
from sepme.demo.emoji.captions import STYLE_PROMPTS, THING_PROMPTS, caption_of
from sepme.demo.emoji.data import BACKGROUND_NAMES
from sepme.demo.emoji.things import STYLES, THINGS, name_of
from sepme.demo.run import demo_suite
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import ratios
from sepme.plan.nearby import COUNT
from sepme.plan.planner import Planner, Subspace

HEAD = "| concept | verdict | others that change | own that slip through | planning, s |\n|---|---|---|---|---|"
NAMES = tuple(name_of(t) for t in THINGS[:50])  # that the embedded model draws
KINDS = NAMES, STYLES, BACKGROUND_NAMES[1:]


def world(things: Sequence[str], styles: Sequence[str], grounds: Sequence[str]) -> list[str]:
    """Prompts that hold two or three words of these."""
    found = [caption_of(t, s, which=i) for i, (s, t) in enumerate(product(styles, things))]
    found += [caption_of(t, "", g, i) for i, (g, t) in enumerate(product(grounds, things))]
    found += [caption_of(t, s, g, i) for i, (s, g, t) in enumerate(product(styles, grounds, things))]
    return found + [caption_of("", s, g, i) for i, (s, g) in enumerate(product(styles, grounds))]


def sets_of(name: str) -> tuple[list[str], list[str]]:
    """Prompts without a word, and with it."""
    rest = [[w for w in kind if not mentions(w, name)] for kind in KINDS]
    singles = [caption_of(t, which=i) for t in rest[0] for i in range(len(THING_PROMPTS))]
    singles += [caption_of("", s, which=i) for s in rest[1] for i in range(len(STYLE_PROMPTS))]
    own = world(*((name,) if name in kind else kind for kind in KINDS))
    return singles + world(*rest), [p for p in own if mentions(p, name)]


def touched(host: DiffusersHost, prompts: Sequence[str], planned: Subspace) -> torch.Tensor:
    """Which prompts the gate opens for, ``(n,)`` bool."""
    parts = (prompts[i : i + 64] for i in range(0, len(prompts), 64))
    return torch.cat([ratios(host.encode(part).context, planned.down) > planned.gate for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nearby", type=int, nargs="+", default=[0, COUNT])
    parser.add_argument("--words", type=int, default=24, help="how many, kinds in turn")
    given = parser.parse_args()
    host = DiffusersHost.load("demo")
    suite = demo_suite().book()
    chosen = [name for row in zip_longest(*KINDS) for name in row if name][: given.words]
    alone = {name: ConceptBook((Concept(name),)) for name in chosen}
    together = {c.name: suite for c in suite.concepts}
    for label, books in (("alone", alone), ("the demo's eighteen together", together)):
        for nearby in given.nearby:
            print(f"\n{label}, {nearby} nearby words\n\n{HEAD}")
            planners: dict[int, Planner] = {}
            for name, book in books.items():
                started = time.process_time()
                if id(book) not in planners:
                    planners[id(book)] = Planner(host, book, PlanOptions(nearby=nearby))
                planned = planners[id(book)].plan_all()[name]
                seconds = time.process_time() - started
                others, own = (touched(host, prompts, planned) for prompts in sets_of(name))
                verdict = planned.certificate.verdict(planned.gate)
                changed, slipped = f"{int(others.sum())} of {len(others)}", f"{int((~own).sum())} of {len(own)}"
                print(f"| {name} | {verdict} | {changed} | {slipped} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
