"""How many concepts at once? 10 to 200 things of the embedded model erased together: pictures, gates, seconds, bytes.

``python benchmarks/scale.py [--counts 10 50 100 200] [--modes tolerance soft] [--edits context layers] [--images 3]``: a table, row by row;
with ``--transformer FOLDER`` of the emoji world's flow transformer (by the context alone; no nearby words are looked for there). Looked at
are ten things with everything erased, and eight that no plan knows of. The model draws 50 things and has read the names of 299.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from sepme.demo.emoji.host import FlowHost
from sepme.errors import SepMEError
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.erasers import Separable
from sepme.evaluate.measure import share
from sepme.evaluate.prompt_sets import Batch
from sepme.evaluate.sampler import Sampled, Sampler
from sepme.evaluate.suite import Suite
from sepme.hosts.diffusers import DEMO, DiffusersHost
from sepme.model.protocols import EvaluationHost, TextEncoder
from sepme.plan.directions import PlanOptions
from sepme.plan.nearby import COUNT
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_deltas

LOOKED_AT, LEFT_OUT = 10, 8
COLUMNS = (
    "things", "mode", "edit", "erased", "unseen", "given back: same bits", "left out: read", "left out: same bits", "studio beside it",
    "own prompts missed", "others' prompts touched", "gates open beside a studio", "planning, s", "kB a concept",
)  # fmt: skip


def suite_of(images: int) -> Suite:
    """All 299 things, those looked at first and those left out last, and the studios."""
    things = json.loads((DEMO / "world.json").read_text(encoding="utf-8"))["things"]
    known, unknown = ([t["name"] for t in things if t["trained"] == trained] for trained in (True, False))
    looked = known[:: len(known) // LOOKED_AT][:LOOKED_AT]
    left = [n for n in known if n not in looked][:: (len(known) - LOOKED_AT) // LEFT_OUT][:LEFT_OUT]
    order = [*looked, *(n for n in known if n not in looked + left), *unknown, *left]
    base = Suite.load("embedded")
    return replace(base, concepts={"object": tuple(order), "style": base.concepts["style"]}, images=images)


def row(sampler: Sampler, count: int, mode: str, edit: str) -> list[object]:
    """The figures of one set."""
    suite, host, sets = sampler.suite, sampler.host, sampler.sets
    names = list(suite.concepts["object"][:count])
    started = time.process_time()
    planner = Planner(host, suite.book(names), PlanOptions(mode=mode, nearby=COUNT))  # type: ignore[arg-type]
    planner.plan_all()
    seconds = time.process_time() - started
    eraser = Separable(make_deltas(planner, names, host, TrainOptions.for_mode(objective="closed-form", edit=edit)))
    looked, left = names[:LOOKED_AT], list(suite.concepts["object"][-LEFT_OUT:])

    def drawn(batches: Sequence[Batch], without: str = "") -> list[Sampled]:
        return [sampler.sample(batch, eraser, [n for n in names if n != without]) for batch in batches]

    def read(parts: Sequence[Sampled]) -> float:
        return fmean(p.accuracy for p in parts)

    neighbours = drawn([sets.own(n) for n in left])
    given_back = [drawn([sets.own(n)], n)[0] for n in looked]
    erased, unseen, both = (drawn([batch(n) for n in looked]) for batch in (sets.own, lambda n: sets.own(n, unseen=True), sets.both))
    own = [p for n in names for p in suite.prompts(n, unseen=True)]
    others = [p for n in suite.concepts["object"][count:] for p in suite.prompts(n, unseen=True)]
    figures = [read(erased), read(unseen), share(given_back), read(neighbours), share(neighbours), read(both)]
    beside = [p for n in looked for p, _ in suite.cooccurring(n)]
    figures += [1 - touched(host, eraser, own), touched(host, eraser, others), float(opened(host, eraser, beside).float().mean())]
    return [count, mode, edit, *(f"{f:.3f}" for f in figures), f"{seconds:.0f}", f"{eraser.bytes / 1000 / count:.1f}"]


def opened(host: TextEncoder, eraser: Separable, prompts: Sequence[str]) -> Tensor:
    """How many gates open for each of some prompts ``(prompts,)``."""
    counts = []
    for i in range(0, len(prompts), 128):
        context = host.encode(prompts[i : i + 128]).context
        counts.append((eraser.composition.weigh(context, torch.ones(len(eraser.composition.deltas)), True)[1] != 0).sum(dim=1))
    return torch.cat(counts)


def touched(host: TextEncoder, eraser: Separable, prompts: Sequence[str]) -> float:
    """Share of prompts for which some gate opens."""
    return float((opened(host, eraser, prompts) > 0).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--modes", nargs="+", default=["tolerance", "soft"])
    parser.add_argument("--edits", nargs="+", default=["context", "layers"])
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--transformer", type=Path, help="the folder flow that python -m sepme.demo.emoji export writes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    host: EvaluationHost = FlowHost.load(given.transformer) if given.transformer else DiffusersHost.load("demo")
    sampler = Sampler(host, EmbeddedClassifier(), suite_of(given.images), lambda: None)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for mode in given.modes:
        for count in given.counts:
            for edit in given.edits:
                try:
                    print("| " + " | ".join(map(str, row(sampler, count, mode, edit))) + " |", flush=True)
                except SepMEError as error:
                    print(f"| {count} | {mode} | {edit} | {error} |", flush=True)
    looked = sampler.suite.concepts["object"][:LOOKED_AT]
    print(f"stock, prompts of the things looked at: {fmean(sampler.stock(sampler.sets.own(n)).accuracy for n in looked):.3f}")


if __name__ == "__main__":
    main()
