"""One concept of ten changed: what is done between the change and the first denoising step, and how long until that step is done.

The prompt carries the changed concept, as a prompt does whose author reaches for that switch; the case in which it carries all ten
is measured too. LoRAs act on every prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..apply.composition import Composition
from ..apply.projector import KVProjector
from ..delta.concept_delta import ConceptDelta
from ..model.layers import projections, weight_of
from ..model.protocols import AttentionLayer
from . import Timing, alternate
from .models import Subject, add_adapters, only, random_deltas, strengths, subject

CONCEPTS = 10
CASES = ((False, False), (True, False), (False, True), (True, True))  # the first step too; every concept touches the prompt


def stubbed(layers: Mapping[str, AttentionLayer], deltas: tuple[ConceptDelta, ...], context: Tensor) -> Callable[[float], None]:
    """All that a toggle costs in the first forward pass, without the model's own work: its projections return one tensor each, to
    which deltas are added over and over.

    Returns:
        a function of the first concept's strength.
    """
    projector = KVProjector(layers, Composition(deltas))
    own = {name: module(context) for name, module in projector.modules.items()}

    def stub(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return projector.wrap(name, module, lambda context: own[name], lambda: weight_of(module))

    sites = [stub(name, module) for name, module in projector.modules.items()]

    def work(strength: float) -> None:
        with projector.forward_pass(strengths(len(deltas), strength)):
            for project in sites:
                project(context)
        projector.clear()

    return work


def ours(model: Subject, first_step: bool, all_touch: bool = False) -> Callable[[], Any]:
    """Toggle the first concept back and forth; ``first_step``: run the denoising step, else everything but the model's own work."""
    deltas, on = random_deltas(model.layers, CONCEPTS), True
    deltas = deltas if all_touch else only(deltas, 0)
    projector, work = KVProjector(model.layers, Composition(deltas)), stubbed(model.layers, deltas, model.context)

    def side() -> None:
        nonlocal on
        on = not on
        if not first_step:
            return work(float(on))
        with projector.attached(strengths(CONCEPTS, float(on))):
            model.step(model.latents, 500)

    return side


def merged(model: Subject, first_step: bool) -> Callable[[], Any]:
    """The same by LoRAs that diffusers merged into the weights: unmerge, weigh anew, merge."""
    twin = model.twin()
    for module in projections(twin.layers).values():  # merging writes to them
        module.weight = nn.Parameter(weight_of(module).clone(), requires_grad=False)
    add_adapters(twin.unet, random_deltas(model.layers, CONCEPTS))
    adapted: list[Any] = list(projections(twin.layers).values())
    names = [f"a{i}" for i in range(CONCEPTS)]
    on = True

    def work() -> None:
        nonlocal on
        on = not on
        for module in adapted:
            module.unmerge()
        twin.unet.set_adapters(names, [float(on), *[1.0] * (CONCEPTS - 1)])
        for module in adapted:
            module.merge()
        if first_step:
            twin.step(twin.latents, 500)

    return work


def run(name: str = "demo", pairs: int = 7) -> dict[str, Any]:
    """Measure one model in diffusers.

    Returns:
        median seconds of both sides (of the processor); ``toggle_speedup_vs_lora`` and ``toggle_speedup_end_to_end``: median over
        pairs of LoRA / ours.
    """
    with torch.no_grad():
        model = subject(name)
        timings = []
        for first_step, all_touch in CASES:
            theirs, mine = merged(model, first_step), ours(model, first_step, all_touch)
            for side in (theirs, mine, theirs, mine):
                side()
            timings.append(alternate(theirs, mine, pairs, time.process_time))
    return summary(*timings) | {
        "host": "diffusers",
        "model": name,
        "lora": "PEFT adapters merged into the weights: unmerged, weighed anew, merged",
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }


def summary(work: Timing, whole: Timing, work_all: Timing, whole_all: Timing) -> dict[str, Any]:
    """The figures of LoRA (first) against ours (second)."""
    return {
        "concepts": CONCEPTS,
        "toggle_speedup_vs_lora": work.ratio,
        "toggle_speedup_end_to_end": whole.ratio,
        "toggle_speedup_vs_lora_all_touch": work_all.ratio,
        "toggle_speedup_end_to_end_all_touch": whole_all.ratio,
        "seconds_work": {"lora": work.first, "ours": work.second},
        "seconds_work_all_touch": {"lora": work_all.first, "ours": work_all.second},
        "seconds_to_first_step": {"lora": whole.first, "ours": whole.second},
    }
