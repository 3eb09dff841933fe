"""How erasure scales: N of the larger world's concepts at once, in every mode, measured on pictures.

``python -m sepme.demo.scale MODEL -o docs/results/world`` goes on where an interrupted run stopped.
Every condition reads, with the classifier,

- *erased*: own prompts of the N concepts, all N on;
- *kept*: prompts of each of the 48 concepts, all of the N on but itself;
- *co-occurring*: prompts that hold one of the N, on, and a concept of another head that is off, all others on; the latter is read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..apply.composition import Composition
from ..apply.toggles import parse_tags, strengths
from ..concepts import Concept, ConceptBook
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..files import write_atomically
from ..hosts.diffusers import DiffusersHost
from ..images import save_grid
from ..plan.directions import PlanOptions
from ..plan.planner import Planner
from ..train import TrainOptions, make_delta
from .classifier import load_classifier
from .large import FAMILIES, LARGE
from .story import Picture, Studio, classifier_accuracy

COUNTS = (6, 12, 24, 48)
BATCH = 48
KEPT = 2  # pictures of each of the 48 concepts
PICTURES = 48  # of the N erased concepts together, at least one of each
# one round: two shapes and one each of the others
ROUND = ("shape", "fill", "shape", "colour", "texture", "place")


def in_rounds() -> tuple[str, ...]:
    """The 48 concepts in rounds of six, so that every N holds all families."""
    families = {k: iter(v) for k, v in FAMILIES.items()}
    return tuple(next(families[f]) for _ in range(8) for f in ROUND)


NAMES = in_rounds()
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}


@dataclass(frozen=True)
class Condition:
    """One cell of the measurement. ``listed``: whether the concepts that are not erased are on the preserve list."""

    count: int
    mode: str = "tolerance"
    padding: str = "all"
    values_only: bool = False
    objective: str = "closed-form"
    gate: bool = True
    listed: bool = True

    @property
    def made(self) -> Condition:
        """What the deltas depend on."""
        return replace(self, gate=True)


def conditions() -> list[Condition]:
    """All cells, those of one plan side by side, the most telling plans first."""
    cells: list[Condition] = []
    for n in COUNTS:
        cells += [Condition(n), Condition(n, gate=False), Condition(n, values_only=True)]
    for n in COUNTS:
        cells += [Condition(n, "soft")]
    for n in COUNTS:
        cells += [Condition(n, padding="none"), Condition(n, padding="none", values_only=True)]
    cells += [Condition(n, "exact", padding=p, listed=o) for n in COUNTS[:2] for p in ("all", "none") for o in (True, False)]
    for n in COUNTS[:2]:
        cells += [Condition(n, objective="gcirs"), Condition(n, objective="gcirs", gate=False)]
    cells += [Condition(n, objective="gcirs", values_only=True) for n in COUNTS[:2]]
    cells += [Condition(n, "soft", padding="none") for n in COUNTS]
    cells += [Condition(n, "soft", values_only=True) for n in COUNTS]
    return cells + [Condition(n, "soft", gate=False) for n in COUNTS]


def own(name: str, count: int) -> list[Picture]:
    """Pictures of a concept's own prompts."""
    head, label = LARGE.place_of(name)
    prompts, first = LARGE.prompts_of(name), NAMES.index(name)
    return [Picture(prompts[(first + i) % len(prompts)], 1000 * first + i, head, label) for i in range(count)]


def beside(name: str, count: int) -> list[Picture]:
    """Pictures of the concept together with ones of other heads, which are kept and read."""
    head, first = LARGE.place_of(name)[0], NAMES.index(name)
    others = [n for n in NAMES[first + 1 :] + NAMES[:first] if LARGE.place_of(n)[0] != head]
    return [
        Picture(f"{LARGE.together(name, other, i)} <keep:{other}>", 50_000 + 1000 * first + i, *LARGE.place_of(other))
        for i, other in ((i, others[7 * i % len(others)]) for i in range(count))
    ]


def allowed(pictures: Sequence[Picture], names: Sequence[str]) -> list[Picture]:
    """The same pictures with only those tags that name a loaded concept."""
    result = []
    for picture in pictures:
        text, tags = parse_tags(picture.prompt)
        result.append(picture._replace(prompt=text + "".join(f" <keep:{n}>" for n in tags if n in names)))
    return result


class Outcome(NamedTuple):
    """Of each picture: read correctly without the composition and with it, and whether it was touched; ``(n,)`` bool."""

    stock: Tensor
    correct: Tensor
    touched: Tensor

    def shares(self) -> dict[str, float]:
        stock, accuracy, touched = (float(v.float().mean()) for v in self)
        return {"stock": stock, "accuracy": accuracy, "touched": touched}


class Bench:
    """The stock model's pictures, and what a composition makes of them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.stock: dict[Picture, bool] = {}

    def read(self, pictures: Sequence[Picture], composition: Composition | None = None, gate: bool = True) -> tuple[Tensor, Tensor]:
        """Whether each picture shows its label ``(n,)``, and the pictures."""
        correct, images = [], []
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH]
            images.append(self.studio.decode(self.studio.latents(part, composition, gate=gate)))
            correct.append(self.studio.correct(images[-1], part))
        return torch.cat(correct), torch.cat(images)

    def stock_of(self, pictures: Sequence[Picture]) -> Tensor:
        """Whether the stock model's pictures show their labels; drawn once."""
        plain = allowed(pictures, ())
        new = [p for p in dict.fromkeys(plain) if p not in self.stock]
        if new:
            self.stock |= dict(zip(new, self.read(new)[0].tolist(), strict=True))
        return torch.tensor([self.stock[p] for p in plain])

    def outcome(self, pictures: Sequence[Picture], composition: Composition, gate: bool) -> Outcome:
        """With and without the composition; pictures that no gate opens for are the stock model's and not drawn again."""
        pictures = allowed(pictures, composition.names)
        stock = self.stock_of(pictures)
        correct, touched = stock.clone(), self.touched(pictures, composition, gate)
        if touched.any():
            chosen = [p for p, t in zip(pictures, touched.tolist(), strict=True) if t]
            correct[touched] = self.read(chosen, composition, gate)[0]
        return Outcome(stock, correct, touched)

    def touched(self, pictures: Sequence[Picture], composition: Composition, gate: bool) -> Tensor:
        texts, tags = zip(*(parse_tags(p.prompt) for p in pictures), strict=True)
        context = self.studio.host.encode(texts).context
        touch = composition.touch(context, strengths(tags, composition.names), gate)
        return torch.zeros(len(pictures), dtype=torch.bool).index_fill_(0, touch.rows, True)


def book_of(count: int, listed: bool) -> ConceptBook:
    """The first ``count`` concepts; the others' prompts are preserved if ``listed``."""
    preserve = tuple(p for n in NAMES[count:] for p in LARGE.prompts_of(n)) if listed else ()
    return ConceptBook(tuple(Concept(n, LARGE.prompts_of(n)) for n in NAMES[:count]), preserve)


def make(host: DiffusersHost, cell: Condition, planners: dict[Any, Planner]) -> tuple[Composition, dict[str, Any]]:
    """Deltas of a cell, and what their certificates say.

    Raises:
        SepMEError: no room.
    """
    started = time.perf_counter()
    key = (cell.count, cell.mode, cell.padding, cell.listed)
    if key not in planners:
        planners.clear()
        options = PlanOptions(mode=cell.mode, padding=cell.padding)  # type: ignore[arg-type]
        planners[key] = Planner(host, book_of(cell.count, cell.listed), options)
        planners[key].plan_all()
    planned = time.perf_counter()
    how = TrainOptions.for_mode(objective=cell.objective, values_only=cell.values_only)
    deltas: list[ConceptDelta] = [make_delta(planners[key], n, host, how) for n in NAMES[: cell.count]]
    certificates = [d.certificate for d in deltas]
    worst = [c.worst_leakage for c in certificates]
    facts = {
        "leakage_worst": max(worst),
        "leakage_median": median(worst),
        "leakage_gated_worst": max(c.worst_leakage_gated for c in certificates),
        "kept_energy_min": min(c.kept_energy for c in certificates),
        "gate_separates": sum(c.gate_overlap == 0 for c in certificates) / cell.count,
        "false_touch_rate": sum(c.false_touch_rate for c in certificates) / cell.count,
        "rank_median": median(c.rank for c in certificates),
        "null_dims_min": min(c.null_dims for c in certificates),
        "seconds_plan": planned - started,
        "seconds_fill": time.perf_counter() - planned,
    }
    return Composition(tuple(deltas)), facts


def measure(bench: Bench, cell: Condition, composition: Composition) -> dict[str, Any]:
    """All figures of a cell, by what is read."""
    each = max(1, PICTURES // cell.count)
    names = NAMES[: cell.count]
    chance = sum(1 / LARGE.heads[LARGE.place_of(n)[0]] for n in names) / cell.count
    erased = bench.outcome([p for n in names for p in own(n, each)], composition, cell.gate)
    family = [FAMILY[n] for n in names for _ in range(each)]
    kept = [p._replace(prompt=f"{p.prompt} <keep:{n}>") for n in NAMES for p in own(n, KEPT)]
    both = [p for n in names for p in beside(n, each)]
    return {
        "erased": erased.shares() | {"chance": chance},
        "erased_by_family": {f: float(erased.correct[[g == f for g in family]].float().mean()) for f in FAMILIES},
        "kept": bench.outcome(kept, composition, cell.gate).shares(),
        "cooccurring": bench.outcome(both, composition, cell.gate).shares(),
    }


def stock_by_family(bench: Bench, each: int = 4) -> dict[str, Any]:
    """Share of the stock model's pictures that are read correctly, by family and by concept."""
    concepts = {n: float(bench.stock_of(own(n, each)).float().mean()) for n in NAMES}
    families = {f: sum(concepts[n] for n in names) / len(names) for f, names in FAMILIES.items()}
    return {"families": families, "concepts": concepts, "images": each}


def picture(bench: Bench, compositions: Sequence[Composition], path: Path, columns: Sequence[str] = NAMES[:12]) -> None:
    """Rows: stock; each composition with all on; the first again with the column's own concept given back."""
    pictures = [own(n, 2)[1] for n in columns]
    rows = [bench.read(pictures)[1]]
    rows += [bench.read(pictures, c)[1] for c in compositions]
    back = [p._replace(prompt=f"{p.prompt} <keep:{n}>") for n, p in zip(columns, pictures, strict=True)]
    rows.append(bench.read(back, compositions[0])[1])
    save_grid(torch.cat(rows), path, len(columns))


def table(cells: Sequence[dict[str, Any]]) -> str:
    """All cells as a Markdown table."""
    head = (
        "N", "objective", "mode", "padding", "edited", "gate", "others listed", "erased (chance)", "touched", "kept: drop", "touched",
        "co-occurring: drop", "leakage, worst", "kept energy, min", "gate separates", "false touches", "s a concept",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for cell in cells:
        c = Condition(**cell["condition"])
        row = [str(c.count), c.objective, c.mode, c.padding, "values" if c.values_only else "keys, values"]
        row += ["on" if c.gate else "off", "yes" if c.listed else "no"]
        if "refused" in cell:
            row += ["refused"] + [""] * (len(head) - len(row) - 1)
        else:
            drop = {k: cell[k]["stock"] - cell[k]["accuracy"] for k in ("kept", "cooccurring")}
            row += [f"{cell['erased']['accuracy']:.3f} ({cell['erased']['chance']:.2f})", f"{cell['erased']['touched']:.2f}"]
            row += [f"{drop['kept']:.3f}", f"{cell['kept']['touched']:.3f}", f"{drop['cooccurring']:.3f}"]
            row += [f"{cell['leakage_worst']:.3f}", f"{cell['kept_energy_min']:.1e}", f"{cell['gate_separates']:.0%}"]
            row += [f"{cell['false_touch_rate']:.4f}", f"{cell['seconds_fill'] / c.count:.3f}"]
        rows.append(tuple(row))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def run(model: Path, out: Path) -> dict[str, Any]:
    """Measure every cell that ``out``/metrics.json does not hold yet; returns all."""
    host = DiffusersHost.load(str(model))
    classifier = load_classifier(model, LARGE)
    bench = Bench(Studio(host, classifier))
    path = out / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": []}

    def save() -> None:
        write_atomically(path, json.dumps(metrics, indent=1).encode())

    if "stock" not in metrics:
        metrics["classifier_accuracy"] = classifier_accuracy(classifier, 3200, LARGE)
        metrics["stock"] = stock_by_family(bench)
        save()
    done = [c["condition"] for c in metrics["cells"]]
    planners: dict[Any, Planner] = {}
    made: dict[Condition, tuple[Composition, dict[str, Any]]] = {}
    for cell in conditions():
        if asdict(cell) in done:
            continue
        entry: dict[str, Any] = {"condition": asdict(cell)}
        started = time.perf_counter()
        try:
            if cell.made not in made:
                made = {cell.made: make(host, cell, planners)}
            composition, facts = made[cell.made]
            entry |= facts | measure(bench, cell, composition)
        except SepMEError as error:
            entry["refused"] = str(error)
        entry["seconds"] = time.perf_counter() - started
        metrics["cells"].append(entry)
        save()
        print(json.dumps(entry), flush=True)
    write_atomically(out / "table.md", table(metrics["cells"]).encode())
    if not (out / "picture.png").exists():
        picture(bench, [make(host, Condition(48, m), planners)[0] for m in ("tolerance", "soft")], out / "picture.png")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder 'model' that `python -m sepme.demo.train --world large` wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results/world"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    run(arguments.model, arguments.out)


if __name__ == "__main__":
    main()
