"""One concept of ten changed: what is done between the change and the first denoising step, and how long until that step is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..composition import Composition
from ..layers import projections, weight_of
from ..runtime import KVProjector
from . import alternate
from .models import Subject, add_adapters, random_deltas, strengths, subject

CONCEPTS = 10


def ours(model: Subject, first_step: bool) -> Callable[[], Any]:
    """Toggle the first concept back and forth on an attached projector.

    Args:
        first_step: run the denoising step; else everything but the model's own work: its projections return what they did before.
    """
    projector = KVProjector(model.layers, Composition(random_deltas(model.layers, CONCEPTS)))
    on = True
    if first_step:

        def whole() -> None:
            nonlocal on
            on = not on
            with projector.attached(strengths(CONCEPTS, float(on))):
                model.step(model.latents, 500)

        return whole

    modules = projector.modules
    own: dict[str, Tensor] = {name: module(model.context) for name, module in modules.items()}

    def stub(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return projector.wrap(name, module, lambda context: own[name])

    projections_of = {name: stub(name, module) for name, module in modules.items()}

    def work() -> None:
        nonlocal on
        on = not on
        with projector.forward_pass(strengths(CONCEPTS, float(on))):
            for project in projections_of.values():
                project(model.context)
        projector.clear()

    return work


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
        median seconds of both sides, ``toggle_speedup_vs_lora`` and ``toggle_speedup_end_to_end`` (median over pairs of LoRA / ours).
    """
    with torch.no_grad():
        model = subject(name)
        timings = []
        for first_step in (False, True):
            theirs, mine = merged(model, first_step), ours(model, first_step)
            for side in (theirs, mine, theirs, mine):
                side()
            timings.append(alternate(theirs, mine, pairs))
    work, whole = timings
    return {
        "host": "diffusers",
        "model": name,
        "lora": "PEFT adapters merged into the weights: unmerged, weighed anew, merged",
        "concepts": CONCEPTS,
        "toggle_speedup_vs_lora": work.ratio,
        "toggle_speedup_end_to_end": whole.ratio,
        "seconds_work": {"lora": work.first, "ours": work.second},
        "seconds_to_first_step": {"lora": whole.first, "ours": whole.second},
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }
