"""Experiments with deltas under toggles: interference, subsets, random toggles, strengths, arrivals and recoveries, order of arrival."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..apply.projector import KVProjector
from ..concepts import ConceptBook
from ..convert import order_gap
from ..delta.concept_delta import ConceptDelta
from ..model.layers import TextBlocks
from ..model.protocols import EvaluationHost
from ..plan.gate import ratios
from ..plan.planner import Planner
from ..train import Job, TrainOptions, each, make_delta, train_book
from .erasers import Eraser, Separable
from .measure import apart, perceived
from .prompt_sets import Batch
from .sampler import Sampler

CELLS = ("leakage", "noise", "image", "accuracy")


def interference(sampler: Sampler, eraser: Separable, gate: bool, count: int = 4) -> dict[str, Any]:
    """N x N: delta i on (row), prompts of j (column), by kind of prompt: leakage, noise distance, image distance, accuracy.

    Leakage is the gate statistic, noise distance ``‖Δε‖ / ‖ε‖``, image distance that of the classifier's features. Prompts: the bare name,
    the trained templates, those never seen, those that hold another concept too, and synonyms (None for concepts without).
    """
    names, host = sampler.suite.names, sampler.host
    gates = {d.concept.name: d.gate for d in eraser.composition.deltas}
    downs = {d.concept.name: d.down for d in eraser.composition.deltas}
    kinds: dict[str, Callable[[str], Batch | None]] = {
        "bare": lambda n: Batch((n,) * count, tuple(range(count)), (n,) * count),
        "templated": sampler.sets.own,
        "unseen": lambda n: sampler.sets.own(n, unseen=True),
        "cooccurring": sampler.sets.both,
        "synonym": sampler.sets.synonyms,
    }
    result: dict[str, Any] = {}
    for kind, make in kinds.items():
        table: dict[str, list[list[float | None]]] = {k: [[None] * len(names) for _ in names] for k in CELLS}
        for j, other in enumerate(names):
            whole = make(other)
            if whole is None:
                continue
            batch = whole.first(count)
            encoding = host.encode(batch.prompts)
            moved = noise_moved(sampler, eraser, batch, gate)
            for i, name in enumerate(names):
                sampled = sampler.sample(batch, eraser, [name], gate)
                leak = float(ratios(encoding.context.cpu(), downs[name]).max())
                table["leakage"][i][j] = 0.0 if gate and leak <= gates[name] else leak
                table["noise"][i][j] = moved[i]
                table["image"][i][j] = perceived(sampler, [(batch, sampled)])
                table["accuracy"][i][j] = sampled.accuracy
        result[kind] = table
    return {"names": names, "kinds": result}


def noise_moved(sampler: Sampler, eraser: Separable, batch: Batch, gate: bool) -> list[float]:
    """``‖Δε‖ / ‖ε‖`` on a batch's prompts, by which of the suite's concepts is erased alone."""
    host = sampler.host
    encoding = host.encode(batch.prompts)
    x = torch.randn((len(batch.prompts), *host.latent_shape), generator=torch.Generator().manual_seed(77)).to(host.device, host.dtype)
    t = torch.full((len(x),), int(0.6 * host.timesteps), device=x.device)
    result = []
    with torch.no_grad():
        plain = host.predict(x, t, encoding.context, encoding.pooled)
        for name in sampler.suite.names:
            with eraser.acting(host, [name], gate):
                moved = host.predict(x, t, encoding.context, encoding.pooled)
            result.append(float((moved - plain).norm() / plain.norm()))
    return result


def subsets(sampler: Sampler, eraser: Separable, gate: bool, count: int) -> list[dict[str, Any]]:
    """Random sets of concepts erased together: accuracy of those that are on and off, and which pictures of the latter are stock's."""
    names = sampler.suite.names
    generator = torch.Generator().manual_seed(sampler.suite.seed + 11)
    rows = []
    for _ in range(count):
        size = int(torch.randint(1, max(2, len(names)), (), generator=generator))
        on = [names[i] for i in sorted(torch.randperm(len(names), generator=generator)[:size].tolist())]
        sampled = {n: sampler.sample(sampler.sets.own(n), eraser, on, gate) for n in names}
        off = [sampled[n] for n in names if n not in on]
        rows.append(
            {
                "on": on,
                "erased_accuracy": fmean(sampled[n].accuracy for n in on),
                "kept_accuracy": fmean(d.accuracy for d in off) if off else None,
                "restored_bit_identical": float(torch.cat([d.same for d in off]).float().mean()) if off else None,
            }
        )
    return rows


def random_toggles(sampler: Sampler, eraser: Separable, cycles: int) -> dict[str, Any]:
    """Random strengths on one attached projector, ``cycles`` times; then all off. Is everything as it was, bit for bit?"""
    host, names = sampler.host, sampler.suite.names
    batch = sampler.sets.own(names[0]).first(2)
    encoding = host.encode(batch.prompts)
    x = sampler.stock(batch).latents.to(host.device)
    t = torch.full((len(x),), int(0.6 * host.timesteps), device=x.device)
    before = {n: p.detach().clone() for n, p in _parameters(host)}
    generator = torch.Generator().manual_seed(5)
    changed = 0
    with torch.no_grad():
        stock = host.predict(x, t, encoding.context, encoding.pooled)
        projector = KVProjector(host.attention_layers(), eraser.composition)

        def predicted(strengths: Tensor) -> Tensor:
            with projector.attached(strengths, encoding.context):
                edited = eraser.composition.edit_context(encoding.context, strengths)
                return host.predict(x, t, edited, encoding.pooled)

        for _ in range(cycles):
            sampler.check()
            drawn = (torch.rand(len(names), generator=generator) < 0.5).float()
            changed += int(not torch.equal(predicted(drawn), stock))
        off = predicted(torch.zeros(len(names)))
        after = host.predict(x, t, encoding.context, encoding.pooled)
    same = all(torch.equal(p, before[n]) for n, p in _parameters(host))
    return {
        "cycles": cycles,
        "changed": changed,
        "off_bit_identical": bool(torch.equal(off, stock)),
        "detached_bit_identical": bool(torch.equal(after, stock)),
        "weights_bit_identical": same,
    }


def _parameters(host: EvaluationHost) -> list[tuple[str, Tensor]]:
    """All parameters of the modules that the attention layers belong to."""
    layers = host.attention_layers()
    modules = layers.modules if isinstance(layers, TextBlocks) else layers
    return [(f"{name}.{key}", p) for name, layer in modules.items() for key, p in cast(nn.Module, layer).named_parameters()]


def strength_sweep(sampler: Sampler, eraser: Separable, gate: bool) -> list[dict[str, float]]:
    """Erased and preserved accuracy against the strength of each concept alone."""
    rows = []
    for strength in sampler.suite.strengths:
        erased, preserved, both = [], [], []
        for name in sampler.suite.names:
            scaled = Separable(eraser.composition.deltas)
            scaled.strength = strength
            erased.append(sampler.sample(sampler.sets.own(name), scaled, [name], gate).accuracy)
            preserved.append(sampler.sample(sampler.sets.others(name), scaled, [name], gate).accuracy)
            both.append(sampler.sample(sampler.sets.both(name), scaled, [name], gate).accuracy)
        rows.append(
            {"strength": strength, "erased_accuracy": fmean(erased), "kept_accuracy": fmean(preserved), "cooccurring_accuracy": fmean(both)}
        )
    return rows


class Arrivals:
    """A separable method whose concepts come over time: each is planned against what is known when it comes, and never made again."""

    def __init__(self, sampler: Sampler, planner_of: Callable[[ConceptBook], Planner], options: TrainOptions) -> None:
        self.sampler, self.planner_of, self.options = sampler, planner_of, options
        self.deltas: dict[str, ConceptDelta] = {}

    def __call__(self, known: list[str]) -> Separable:
        """The method once these concepts are known; makes the deltas that are missing."""
        fresh, check = [n for n in known if n not in self.deltas], self.sampler.check
        if fresh:
            job = Job(self.planner_of(self.sampler.suite.book(known)), self.sampler.host, self.options, fresh, each(fresh))
            train_book(job, lambda d: self.deltas.update({d.concept.name: d}), lambda step: check(), check)
        return Separable(list(self.deltas.values()))


def scene(
    sampler: Sampler,
    eraser_of: Callable[[list[str]], Eraser],
    events: Any,
    names: Sequence[str] | None = None,
    pictures: int | None = None,
) -> list[dict[str, Any]]:
    """Erasures and recoveries one after the other.

    Args:
        eraser_of: a method once some concepts are known.
        names: the concepts that are looked at, all of the suite's by default.
        pictures: of a group of concepts, at least; the suite's ``images`` of each concept by default.

    Returns:
        after every event, with the gate on and (where there is one) off, what is erased, recovered and regular (never touched): accuracy
        and stock's, Fréchet and perceptual distance to stock.
    """
    known: list[str] = []
    active: list[str] = []
    rows = []
    for event in events:
        ((kind, given),) = event.items()
        if kind == "erase":
            known += [n for n in given if n not in known]
            active += [n for n in given if n not in active]
        else:
            active = [n for n in active if n not in given]
        eraser = eraser_of(known)
        groups = {
            "erased": active,
            "recovered": [n for n in known if n not in active],
            "regular": [n for n in names or sampler.suite.names if n not in known],
        }
        deltas = eraser.composition.deltas if isinstance(eraser, Separable) else ()
        norms = {d.concept.name: increment_norm(d) for d in deltas if d.concept.name in active}
        for gate in (True, False) if eraser.gated else (True,):
            found = {group: _group(sampler, eraser, members, active, gate, pictures) for group, members in groups.items() if members}
            rows.append({"event": f"{kind} {', '.join(given)}", "gate": gate, "norm": norms} | found)
    return rows


def _group(sampler: Sampler, eraser: Eraser, members: list[str], active: list[str], gate: bool, pictures: int | None) -> dict[str, Any]:
    size = sampler.suite.batch
    count = size * ceil((pictures or 0) / len(members) / size) or None  # whole pieces, so that groups share stock's
    batches = [sampler.sets.own(n, count=count) for n in members]
    sampled = [sampler.sample(b, eraser, active, gate) for b in batches]
    fid, lpips = apart(sampler, list(zip(batches, sampled, strict=True)))
    return {
        "concepts": list(members),
        "pictures": sum(len(b.prompts) for b in batches),
        "accuracy": fmean(d.accuracy for d in sampled),
        "stock_accuracy": fmean(sampler.stock(b).accuracy for b in batches),
        "fid": fid,
        "lpips": lpips,
        "bit_identical": float(torch.cat([d.same for d in sampled]).float().mean()),
    }


def increment_norm(delta: ConceptDelta) -> float:
    """``‖Δθ‖_p = ‖Δθ‖_1 / M`` (Eq. 3), M the number of projections."""
    return sum(float(delta.weight_delta(n).abs().sum()) for n in delta.up) / len(delta.up)


def order_gaps(sampler: Sampler, planner_of: Callable[[ConceptBook], Planner], options: TrainOptions, names: list[str]) -> dict[str, float]:
    """How far the order in which the others arrive shows in a concept's delta; see :func:`sepme.convert.order_gap`."""
    layers, book = sampler.host.attention_layers(), sampler.suite.book()
    gaps = {}
    for name in names:
        sampler.check()
        alone = make_delta(planner_of(sampler.suite.book([name])), name, sampler.host, options, check=sampler.check)
        gaps[name] = order_gap(alone, book, planner_of, layers)
    return gaps


def losses(deltas: Mapping[str, ConceptDelta]) -> dict[str, list[float]]:
    """Every delta's loss at every step, by concept."""
    return {name: list(d.facts.losses) for name, d in deltas.items()}
