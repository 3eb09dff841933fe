"""Small pictures for delta files: what a concept's prompt draws with the MODEL as it is, and with the concept erased."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.thumbnail import bearable, with_thumbnail
from ..sepme.errors import SepMEError
from . import host

MAX_DRAWN = 256

_drawn: OrderedDict[Any, str] = OrderedDict()  # by delta and MODEL: switches of SepME Erase draw nothing anew


def with_thumbnails(
    model: Any, clip: Any, deltas: Sequence[ConceptDelta], on_progress: Callable[[float], None] = lambda done: None
) -> tuple[ConceptDelta, ...]:
    """Deltas with their pictures; as they are where the MODEL is no Stable Diffusion, or would draw for minutes.

    Args:
        on_progress: called with the share that is done, 0 to 1; it may raise ComfyUI's interruption.
    """
    try:
        denoiser = host.UNetDenoiser(model)
    except SepMEError:
        return tuple(deltas)
    if not bearable(model.load_device.type, sum(p.numel() for p in model.model.parameters())):
        return tuple(deltas)
    parts = (host.part_of(on_progress, i, len(deltas)) for i in range(len(deltas)))
    return tuple(replace(d, thumbnail=_thumbnail(model, clip, denoiser, d, part)) for d, part in zip(deltas, parts, strict=True))


def _thumbnail(model: Any, clip: Any, denoiser: host.UNetDenoiser, delta: ConceptDelta, on_progress: Callable[[float], None]) -> str:
    key = (delta.content_hash(), model.patches_uuid)
    if key not in _drawn:
        drawn = with_thumbnail(delta, partial(_draw, model, clip, denoiser, on_progress)).thumbnail
        if not drawn:
            return ""
        _drawn[key] = drawn
        while len(_drawn) > MAX_DRAWN:
            _drawn.popitem(last=False)
    return _drawn[key]


def _draw(
    model: Any, clip: Any, denoiser: host.UNetDenoiser, on_progress: Callable[[float], None], prompt: str, deltas: Sequence[ConceptDelta]
) -> Any:
    positive, negative = (host.conditioning(clip, text) for text in (prompt, ""))
    latent = {"samples": torch.zeros(1, *denoiser.latent_shape)}
    part = host.part_of(on_progress, len(deltas), 2)
    patcher = host.apply_deltas(model, tuple(deltas), {}) if deltas else model
    return denoiser.picture(host.sample(patcher, positive, negative, latent, host.Sampling(), part))
