"""Sampling with concepts erased against sampling without, and against the ways in which a host applies as many LoRAs.

All sides draw the same picture by turns, in an order that changes from round to round, so that whatever else the machine does hits
all; each run's time is divided by the stock run's of the same round. It is the processor's time, which leaves out what others take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..apply.composition import Composition
from ..apply.projector import KVProjector
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..model.layers import weight_of
from ..model.protocols import AttentionLayer
from . import seconds
from .counting import count
from .models import Subject, add_adapters, barely_cached, merge, random_deltas, random_edits, strengths, subject

Side = Callable[[], Any]


def rounds(
    sides: dict[str, Side], number: int, on_progress: Callable[[str, int, int], None], prepare: Callable[[str], Any] = lambda name: None
) -> dict[str, dict[str, float]]:
    """Time the sides by turns.

    Args:
        sides: what is run, by name; ``stock`` is what the others are divided by.
        prepare: called before each run, not timed.

    Returns:
        by name: median ``seconds`` (of the processor), median ``ratio`` to stock, ``low`` and ``high``: the quartiles of the ratio.
    """
    names, times = list(sides), []
    for i in range(number):
        on_progress("Rounds", i, number)
        order = names[i % len(names) :] + names[: i % len(names)]
        taken = {}
        for name in order if i % 2 else reversed(order):
            prepare(name)
            taken[name] = seconds(sides[name], time.process_time)
        times.append(taken)
    on_progress("Rounds", number, number)
    result = {}
    for name in names:
        ratios = sorted(t[name] / t["stock"] for t in times)
        result[name] = {
            "seconds": median(t[name] for t in times),
            "ratio": median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[-1 - len(ratios) // 4],
        }
    return result


def diffusers_sides(model: Subject, concepts: tuple[int, ...]) -> dict[str, Callable[[int], Any]]:
    """Sampling runs of so many steps, by name; ours is attached anew for every run, as it is in use.

    ``ours``: per-layer deltas; ``context``: as many edits of the context.
    """
    deltas = random_deltas(model.layers, max(concepts, default=0))

    def ours(number: int) -> Callable[[int], Any]:
        projector = KVProjector(model.layers, Composition(deltas[:number]))

        def run(steps: int) -> Any:
            with projector.attached(strengths(number)):
                return model.sample(steps)

        return run

    def edits(number: int) -> Callable[[int], Any]:
        composition = Composition(random_edits(model.context.shape[-1], number))

        def run(steps: int) -> Any:
            return replace(model, context=composition.edit_context(model.context, strengths(number))).sample(steps)

        return run

    def cached(steps: int) -> Any:
        with barely_cached(model.layers):
            return model.sample(steps)

    def twin(change: Callable[[Any, tuple[ConceptDelta, ...]], None], number: int) -> Callable[[int], Any]:
        """Made when it is first run, before anything is counted or timed."""

        @cache
        def made() -> Subject:
            result = model.twin()
            change(result.unet, deltas[:number])
            return result

        return lambda steps: made().sample(steps)

    sides: dict[str, Callable[[int], Any]] = {"stock": model.sample, "stock_kept": cached}
    for number in concepts:
        sides[f"ours_{number}"] = ours(number)
        if number:
            sides[f"context_{number}"] = edits(number)
            sides[f"lora_merged_{number}"] = twin(merge, number)
            sides[f"peft_unmerged_{number}"] = twin(add_adapters, number)
    return sides


def second_step(sides: dict[str, Callable[[int], Any]]) -> dict[str, dict[str, int]]:
    """Counts of a step from the second on: those of two steps less those of one."""
    result = {}
    for name, side in sides.items():
        side(1)  # what is made at the first run is not counted
        one, two = (count(lambda n=n: side(n)) for n in (1, 2))  # type: ignore[misc]  # noqa: B023
        result[name] = {key: two[key] - one[key] for key in one}
    return result


def cached_bytes(layers: Mapping[str, AttentionLayer], context: Tensor, number: int) -> dict[str, int]:
    """Bytes of the deltas as they are in memory, and of what is cached of one batch of prompts."""
    deltas = random_deltas(layers, number)
    projector = KVProjector(layers, Composition(deltas))
    with projector.attached(strengths(number)):
        for module in projector.modules.values():
            module(context.to(weight_of(module).dtype))
        held = projector.cached_bytes
    return {"delta_bytes": sum(t.numel() * t.element_size() for d in deltas for t in d.tensors().values()), "cache_bytes": held}


def run(
    name: str = "demo",
    concepts: tuple[int, ...] = (0, 1, 10, 100),
    steps: int = 20,
    number: int = 7,
    only: tuple[str, ...] = (),
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Measure one model in diffusers.

    Args:
        only: sides that are run beside stock and ours of the largest number; all by default.

    Returns:
        ``sides`` (see :func:`rounds`), ``per_step`` (see :func:`second_step`), and of the largest number of concepts N
        ``overhead_ratio_n<N>``, ``flops_ratio_n<N>``, ``ops_per_step_ours``, ``ops_per_step_stock``, ``delta_bytes``, ``cache_bytes``;
        where edits of the context were run also ``overhead_ratio_context_n<N>`` and ``ops_per_step_context``.
    """
    with torch.no_grad():
        model = subject(name)
        sides = chosen(diffusers_sides(model, concepts), only, max(concepts))
        counts = second_step(sides)
        timed = rounds({n: (lambda side=side: side(steps)) for n, side in sides.items()}, number, on_progress)  # type: ignore[misc]
        most = max(concepts)
        return summary(timed, counts, most) | cached_bytes(model.layers, model.context, most) | {
            "host": "diffusers", "model": name, "steps": steps, "rounds": number, "threads": torch.get_num_threads(),
        }  # fmt: skip


def chosen(sides: dict[str, Callable[[int], Any]], only: tuple[str, ...], most: int) -> dict[str, Callable[[int], Any]]:
    """The sides named, stock, and ours of ``most`` concepts; all sides if none is named.

    Raises:
        SepMEError: there is no such side.
    """
    if unknown := set(only) - set(sides):
        raise SepMEError(f"There is no side {sorted(unknown)[0]!r}; choose from {', '.join(sides)}.")
    return {n: s for n, s in sides.items() if not only or n in (*only, "stock", f"ours_{most}")}


def summary(timed: dict[str, dict[str, float]], counts: dict[str, dict[str, int]], most: int) -> dict[str, Any]:
    """The figures that are asked for by name, beside all sides."""
    ours, context = f"ours_{most}", f"context_{most}"
    edits = {}
    if context in timed:
        edits = {f"overhead_ratio_context_n{most}": timed[context]["ratio"], "ops_per_step_context": counts[context]["operators"]}
    return edits | {
        f"overhead_ratio_n{most}": timed[ours]["ratio"],
        f"flops_ratio_n{most}": counts[ours]["flops"] / counts["stock"]["flops"],
        "ops_per_step_ours": counts[ours]["operators"],
        "ops_per_step_stock": counts["stock"]["operators"],
        "sides": timed,
        "per_step": counts,
    }
