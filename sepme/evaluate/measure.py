"""The figures of one method: erased, kept, co-occurring, restored, untouched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .prompt_sets import Batch
from .sampler import Sampled, Sampler
from .erasers import Eraser
from .classifiers import frechet, perceptual

Shown = dict[str, list[Tensor]]  # pictures by condition: one batch a concept


def figures(sampler: Sampler, eraser: Eraser, gate: bool, show: int) -> tuple[dict[str, Any], Shown]:
    """All figures of a method, and the first ``show`` pictures of each condition.

    ``erased_accuracy``: the concept's own prompts, it alone erased. ``kept_accuracy``: other concepts' prompts meanwhile.
    ``cooccurring_accuracy``: prompts that hold it and another, which should be seen. ``restored_bit_identical``: its own prompts with
    all others erased. ``untouched_bit_identical``: other concepts' prompts with it alone erased, and unrelated, preserved and empty
    prompts with everything erased. ``neighbour_accuracy``: concepts that no method was told of, with everything erased.
    """
    names = sampler.suite.names
    rows: dict[str, list[float]] = {}
    restored, untouched = [], []
    shown: Shown = {"erased": [], "both": [], "restored": []}
    for name in names:
        own, others, both, unseen = sampler.sets.own(name), sampler.sets.others(name), sampler.sets.both(name), sampler.sets.own(name, unseen=True)
        rest = [n for n in names if n != name]
        alone, every, back = (sampler.sample(own, eraser, e, gate) for e in ([name], names, rest))
        kept, pair = (sampler.sample(b, eraser, [name], gate) for b in (others, both))
        restored.append(back.same)
        untouched.append(kept.same)
        for key, drawn in (("erased", alone), ("restored", back), ("both", pair)):
            shown[key].append(drawn.first(show))
        found = {
            "erased_accuracy": alone.accuracy,
            "erased_accuracy_all_on": every.accuracy,
            "erased_accuracy_unseen": sampler.sample(unseen, eraser, [name], gate).accuracy,
            "erased_accuracy_weighted": sampler.sample(sampler.sets.weighted(name), eraser, [name], gate).accuracy,
            "kept_accuracy": kept.accuracy,
            "kept_accuracy_all_others_on": back.accuracy,
            "cooccurring_accuracy": pair.accuracy,
        } | dict(zip(("kept_fid", "kept_lpips"), apart(sampler, [(own, back)]), strict=True))
        for key, value in found.items():
            rows.setdefault(key, []).append(value)
    plain = [sampler.sample(b, eraser, names, gate) for b in (sampler.sets.unrelated(), sampler.sets.preserved())]
    result: dict[str, Any] = {key: fmean(values) for key, values in rows.items()}
    result |= {
        "restored_bit_identical": float(torch.cat(restored).float().mean()),
        "untouched_bit_identical": float(torch.cat([*untouched, *(d.same for d in plain)]).float().mean()),
        "unrelated_bit_identical": float(plain[0].same.float().mean()),
        "preserved_bit_identical": float(plain[1].same.float().mean()),
        "unrelated_lpips": apart(sampler, [(sampler.sets.unrelated(), plain[0])])[1],
        "concepts": {n: {k: v[i] for k, v in rows.items()} for i, n in enumerate(names)},
    }
    if sampler.suite.neighbours:
        near = sampler.sample(sampler.sets.neighbours(), eraser, names, gate)
        result |= {"neighbour_accuracy": near.accuracy, "neighbour_bit_identical": float(near.same.float().mean())}
        shown["neighbours"] = [near.first(show)]
    return result, shown


def apart(sampler: Sampler, pairs: Sequence[tuple[Batch, Sampled]]) -> tuple[float, float]:
    """Fréchet and perceptual distance of batches' pictures to the stock model's; (0, 0) where all are the same."""
    if all(drawn.same.all() for _, drawn in pairs):
        return 0.0, 0.0

    def images() -> Iterator[Tensor]:
        return (piece for _, drawn in pairs for piece in drawn.pieces())

    def stock() -> Iterator[Tensor]:
        return (piece for batch, _ in pairs for piece in sampler.stock(batch).pieces())

    return frechet(sampler.judge, images(), stock()), perceptual(sampler.judge, images(), stock())


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
