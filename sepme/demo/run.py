"""``sepme demo --full``: erase the embedded model's things and studios one by one and together, and measure everything on pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..concepts import file_name
from ..delta.concept_delta import ConceptDelta
from ..evaluate.classifiers import EmbeddedClassifier
from ..evaluate.erasers import Separable
from ..evaluate.experiments import noise_moved
from ..evaluate.measure import Conditions, conditions, share
from ..evaluate.prompt_sets import Batch
from ..evaluate.sampler import Sampled, Sampler
from ..evaluate.suite import Suite
from ..files import write_atomically
from ..hosts.diffusers import DEMO, DiffusersHost
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from ..train import Job, TrainOptions, each, train_book
from .report import write_report

MOST = 18  # concepts
METHODS = {"gcirs": ("gcirs", "G-CiRs"), "closed_form": ("closed-form", "Closed form")}  # objective and title, by key of the metrics


def classifier_accuracy() -> dict[str, float]:
    """Accuracy of the embedded classifier by kind of label, on drawings placed as none was in training; measured when it was trained."""
    world: dict[str, dict[str, float]] = json.loads((DEMO / "world.json").read_text(encoding="utf-8"))
    return world["classifier_accuracy"]


def chance(suite: Suite, classifier: EmbeddedClassifier) -> float:
    """Share of pictures that somebody who guesses would read right, mean of the concepts."""
    return fmean(1 / len(classifier.model.labels[classifier.model.place_of(name)[0]]) for name in suite.names)


def demo_suite(concepts: int = MOST, images: int = 20) -> Suite:
    """The embedded model's concepts; of a shorter list every other one is a style."""
    suite = Suite.load("embedded")
    objects, styles = suite.concepts.values()
    chosen = [name for pair in zip(objects, styles, strict=True) for name in pair][: max(2, min(concepts, MOST))]
    kinds = {kind: tuple(n for n in names if n in chosen) for kind, names in suite.concepts.items()}
    return replace(suite, concepts=kinds, images=images, batch=images)


def run_demo(host: DiffusersHost, out: Path, images: int = 20, concepts: int = MOST, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Run the whole demo and write ``deltas/``, ``report.html`` and ``metrics.json`` into ``out``; returns the metrics."""
    started = time.perf_counter()
    suite = demo_suite(concepts, images)
    classifier = EmbeddedClassifier()
    sampler = Sampler(host, classifier, suite, lambda: None)
    half = Sampler(DiffusersHost.load("demo", torch.bfloat16), sampler.classifier, suite, lambda: None)
    planner = Planner(host, suite.book())
    for i, name in enumerate(suite.names):
        on_progress("Stock pictures", i, len(suite.names))
        for batch in (sampler.sets.own(name), sampler.sets.others(name), sampler.sets.both(name)):
            sampler.stock(batch)
    on_progress("Stock pictures", len(suite.names), len(suite.names))
    results: dict[str, dict[str, Any]] = {}
    shows: dict[str, dict[str, list[torch.Tensor]]] = {}
    matrices: dict[str, list[list[float]]] = {}
    made: dict[str, dict[str, ConceptDelta]] = {}
    for key, (objective, title) in METHODS.items():
        deltas, seconds = _make(host, planner, TrainOptions.for_mode(objective=objective), out / "deltas" / key, title, on_progress)
        eraser = Separable(list(deltas.values()))
        gated = {}
        for gate in (True, False):
            what = f"{title}, gate {'on' if gate else 'off'}"
            found = _sampled(sampler, eraser, gate, f"{title}: pictures, gate {'on' if gate else 'off'}", on_progress)
            gated[gate] = _figures(sampler, eraser, found, gate) | _half_precision(half, eraser, gate) | _leakage(deltas, gate)
            columns = [noise_moved(sampler, eraser, sampler.sets.own(n).first(4), gate) for n in suite.names]
            matrices[what] = [list(row) for row in zip(*columns, strict=True)]
            if gate:
                shows[key] = {c: [getattr(f, c).first(6) for f in found.values()] for c in Conditions._fields}
        certificates = [d.certificate for d in deltas.values()]
        results[key] = gated[True] | {
            "false_touch_rate": fmean(c.false_touch_rate for c in certificates),
            "kept_energy_min": min(c.kept_energy for c in certificates),
            "delta_bytes_max": max((out / "deltas" / key / f"{file_name(n)}.safetensors").stat().st_size for n in deltas),
            "seconds_per_concept": seconds,
            "gate_off": gated[False],
        }
        made[key] = deltas
    per_concept = {k: r.pop("seconds_per_concept") for k, r in results.items()}
    metrics: dict[str, Any] = results["gcirs"] | {
        "closed_form": results["closed_form"],
        "classifier_accuracy": classifier_accuracy(),
        "chance_accuracy": chance(suite, classifier),
        "seconds_train_per_concept": per_concept["gcirs"],
        "seconds_closed_form_per_concept": per_concept["closed_form"],
        "images_per_condition": images,
        "denoising_steps": suite.steps,
        "threads": torch.get_num_threads(),
    }
    sets = {"own": sampler.sets.own, "both": sampler.sets.both}
    stock = {c: {n: sampler.stock(batch(n)).first(6) for n in suite.names} for c, batch in sets.items()}
    prompts = {n: sampler.sets.both(n).prompts for n in suite.names}
    write_report(out / "report.html", metrics, suite.names, stock, prompts, shows, matrices, made)
    metrics["seconds_total"] = time.perf_counter() - started
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True).encode())
    return metrics


def _make(
    host: DiffusersHost, planner: Planner, options: TrainOptions, folder: Path, title: str, on_progress: OnProgress
) -> tuple[dict[str, ConceptDelta], float]:
    """Make and save the deltas of all concepts; seconds per concept (planning included)."""
    deltas: dict[str, ConceptDelta] = {}
    started, names = time.perf_counter(), planner.prompts.names

    def tell() -> None:
        on_progress(f"{title}: training", len(deltas), len(names))

    def save(delta: ConceptDelta) -> None:
        name = delta.concept.name
        deltas[name] = ConceptDelta.load(delta.save(folder / f"{file_name(name)}.safetensors"))
        tell()

    train_book(Job(planner, host, options, names, each(names)), save, lambda step: tell())
    return deltas, (time.perf_counter() - started) / len(names)


def _sampled(sampler: Sampler, eraser: Separable, gate: bool, what: str, on_progress: OnProgress) -> dict[str, Conditions]:
    names, found = sampler.suite.names, {}
    for i, name in enumerate(names):
        on_progress(what, i, len(names))
        found[name] = conditions(sampler, eraser, name, gate)
    on_progress(what, len(names), len(names))
    return found


def _figures(sampler: Sampler, eraser: Separable, found: Mapping[str, Conditions], gate: bool) -> dict[str, Any]:
    """Figures by concept and their means."""
    sets, concepts = sampler.sets, {}
    for name, seen in found.items():
        own, others, both = (sampler.stock(b).accuracy for b in (sets.own(name), sets.others(name), sets.both(name)))
        concepts[name] = {
            "stock_accuracy": own,
            "erased_accuracy_single": seen.alone.accuracy,
            "erased_accuracy_all": seen.everything.accuracy,
            "kept_accuracy_drop_one_on": others - seen.others.accuracy,
            "kept_accuracy_drop_eleven_on": own - seen.restored.accuracy,
            "cooccurring_drop": both - seen.both.accuracy,
            "restored_bit_identical": share([seen.restored]),
            "untouched_bit_identical": share([seen.others]),
        }
    figures: dict[str, Any] = {k: fmean(c[k] for c in concepts.values()) for k in next(iter(concepts.values()))}
    unrelated = sampler.sample(_unrelated(sampler), eraser, sampler.suite.names, gate)
    figures["kept_accuracy_drop"] = max(figures["kept_accuracy_drop_one_on"], figures["kept_accuracy_drop_eleven_on"])
    figures["untouched_bit_identical"] = share([*(f.others for f in found.values()), unrelated])
    return figures | {"concepts": concepts}


def _unrelated(sampler: Sampler) -> Batch:
    return sampler.sets.unrelated().first(sampler.suite.images)


def _half_precision(half: Sampler, eraser: Separable, gate: bool) -> dict[str, float]:
    """Bit identity of latents in bfloat16, of prompts of all concepts, each with tags that give back itself, or all others."""
    names = half.suite.names
    mixed = [half.sets.own(names[i % len(names)]) for i in range(half.suite.images)]
    prompts, seeds = (tuple(getattr(batch, part)[i] for i, batch in enumerate(mixed)) for part in ("prompts", "seeds"))
    stock = half.stock(Batch(prompts, seeds)).latents

    def same(given_back: Callable[[int], Sequence[str]]) -> Sampled:
        tagged = tuple(p + "".join(f" <keep:{n}>" for n in given_back(i)) for i, p in enumerate(prompts))
        latents = half.sample(Batch(tagged, seeds), eraser, names, gate).latents
        return Sampled(float("nan"), (latents == stock).flatten(1).all(1), latents, half.decode)

    own = same(lambda i: [names[i % len(names)]])
    others = same(lambda i: [n for j, n in enumerate(names) if j != (i + 1) % len(names)])
    unrelated = half.sample(_unrelated(half), eraser, names, gate)
    return {"restored_bit_identical_bf16": share([own]), "untouched_bit_identical_bf16": share([others, unrelated])}


def _leakage(deltas: Mapping[str, ConceptDelta], gate: bool) -> dict[str, float]:
    certificates = [d.certificate for d in deltas.values()]
    linear = max(c.worst_leakage for c in certificates)
    gated = max(v for c in certificates for v in c.leakage_gated.values())
    return {"leakage_linear_max": linear, "leakage_gated_max": gated if gate else linear}
