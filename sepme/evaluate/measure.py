"""The figures of one method: erased, preserved, co-occurring, restored, untouched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .classifiers import frechet, perceptual
from .erasers import Eraser
from .prompt_sets import Batch
from .sampler import Sampled, Sampler

Shown = dict[str, list[Tensor]]  # pictures by condition: one batch a concept


class Conditions(NamedTuple):
    """One concept's pictures under a method.

    Attributes:
        alone: its own prompts, it alone erased.
        everything: the same, all concepts erased.
        restored: the same, all others erased.
        others: other concepts' prompts with it alone erased.
        both: prompts that hold it and another, which should be seen.
    """

    alone: Sampled
    everything: Sampled
    restored: Sampled
    others: Sampled
    both: Sampled


def conditions(sampler: Sampler, eraser: Eraser, name: str, gate: bool) -> Conditions:
    """Sample them."""
    names, sets = sampler.suite.names, sampler.sets
    own = [sampler.sample(sets.own(name), eraser, erased, gate) for erased in ([name], names, [n for n in names if n != name])]
    return Conditions(*own, *(sampler.sample(b, eraser, [name], gate) for b in (sets.others(name), sets.both(name))))


def share(parts: Sequence[Sampled]) -> float:
    """Share of pictures that equal stock's bit for bit."""
    return float(torch.cat([p.same for p in parts]).float().mean())


def figures(sampler: Sampler, eraser: Eraser, gate: bool, show: int) -> tuple[dict[str, Any], Shown]:
    """All figures of a method, and the first ``show`` pictures of each condition.

    ``erased_accuracy``: the concept's own prompts, it alone erased. ``kept_accuracy``: other concepts' prompts meanwhile.
    ``cooccurring_accuracy``: prompts that hold it and another, which should be seen. ``restored_bit_identical``: its own prompts with
    all others erased. ``untouched_bit_identical``: other concepts' prompts with it alone erased, and unrelated, preserved and empty
    prompts with everything erased. ``neighbour_accuracy``: concepts that no method was told of, with everything erased.
    """
    names, sets = sampler.suite.names, sampler.sets
    rows: dict[str, list[float]] = {}
    found: list[Conditions] = []
    shown: Shown = {"erased": [], "both": [], "restored": []}
    for name in names:
        seen = conditions(sampler, eraser, name, gate)
        found.append(seen)
        for key, sampled in (("erased", seen.alone), ("restored", seen.restored), ("both", seen.both)):
            shown[key].append(sampled.first(show))
        values = {
            "erased_accuracy": seen.alone.accuracy,
            "erased_accuracy_all_on": seen.everything.accuracy,
            "erased_accuracy_unseen": sampler.sample(sets.own(name, unseen=True), eraser, [name], gate).accuracy,
            "erased_accuracy_weighted": sampler.sample(sets.weighted(name), eraser, [name], gate).accuracy,
            "kept_accuracy": seen.others.accuracy,
            "kept_accuracy_all_others_on": seen.restored.accuracy,
            "cooccurring_accuracy": seen.both.accuracy,
        } | dict(zip(("kept_fid", "kept_lpips"), apart(sampler, [(sets.own(name), seen.restored)]), strict=True))
        for key, value in values.items():
            rows.setdefault(key, []).append(value)
    plain = [sampler.sample(b, eraser, names, gate) for b in (sets.unrelated(), sets.preserved())]
    result: dict[str, Any] = {key: fmean(values) for key, values in rows.items()}
    result |= {
        "restored_bit_identical": share([f.restored for f in found]),
        "untouched_bit_identical": share([*(f.others for f in found), *plain]),
        "unrelated_bit_identical": share(plain[:1]),
        "preserved_bit_identical": share(plain[1:]),
        "unrelated_lpips": perceived(sampler, [(sets.unrelated(), plain[0])]),
        "concepts": {n: {k: v[i] for k, v in rows.items()} for i, n in enumerate(names)},
    }
    if sampler.suite.neighbours:
        near = sampler.sample(sets.neighbours(), eraser, names, gate)
        result |= {"neighbour_accuracy": near.accuracy, "neighbour_bit_identical": share([near])}
        shown["neighbours"] = [near.first(show)]
    return result, shown


def apart(sampler: Sampler, pairs: Sequence[tuple[Batch, Sampled]]) -> tuple[float, float]:
    """Fréchet and perceptual distance of batches' pictures to the stock model's; (0, 0) where all are the same."""
    if all(sampled.same.all() for _, sampled in pairs):
        return 0.0, 0.0
    return frechet(sampler.classifier, _drawn(pairs), _stock(sampler, pairs)), perceived(sampler, pairs)


def perceived(sampler: Sampler, pairs: Sequence[tuple[Batch, Sampled]]) -> float:
    """The perceptual one of both distances."""
    return 0.0 if all(s.same.all() for _, s in pairs) else perceptual(sampler.classifier, _drawn(pairs), _stock(sampler, pairs))


def _drawn(pairs: Sequence[tuple[Batch, Sampled]]) -> Iterator[Tensor]:
    return (piece for _, sampled in pairs for piece in sampled.pieces())


def _stock(sampler: Sampler, pairs: Sequence[tuple[Batch, Sampled]]) -> Iterator[Tensor]:
    return (piece for batch, _ in pairs for piece in sampler.stock(batch).pieces())


def stock_figures(sampler: Sampler, show: int) -> tuple[dict[str, float], Shown]:
    """What the model as it is reaches on the same pictures."""
    names = sampler.suite.names
    own = [sampler.stock(sampler.sets.own(n)).first(show) for n in names]
    shown = {"erased": own, "both": [sampler.stock(sampler.sets.both(n)).first(show) for n in names], "restored": own}
    if sampler.suite.neighbours:
        shown["neighbours"] = [sampler.stock(sampler.sets.neighbours()).first(show)]
    sets = {
        "erased_accuracy": [sampler.sets.own(n) for n in names],
        "erased_accuracy_unseen": [sampler.sets.own(n, unseen=True) for n in names],
        "kept_accuracy": [sampler.sets.others(n) for n in names],
        "cooccurring_accuracy": [sampler.sets.both(n) for n in names],
        "neighbour_accuracy": [sampler.sets.neighbours()] if sampler.suite.neighbours else [],
        "synonym_accuracy": [b for b in map(sampler.sets.synonyms, names) if b],
    }
    return {key: fmean(sampler.stock(b).accuracy for b in batches) for key, batches in sets.items() if batches}, shown
