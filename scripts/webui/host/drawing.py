"""Small pictures for delta files, by the checkpoint in the UI: what a prompt draws as the checkpoint is, and with deltas on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from modules import sd_samplers_common
from torch import Tensor

from ....sepme.apply.composition import Composition
from ....sepme.apply.projector import KVProjector
from ....sepme.delta.concept_delta import ConceptDelta
from ....sepme.delta.thumbnail import bearable
from ....sepme.model.schedule import GLANCE, runs
from .loaded import LoadedModel

if TYPE_CHECKING:
    from PIL.Image import Image

    from ....sepme.delta.thumbnail import Draw

COLOURS = 2  # of the host's ways to show latents the one that needs no decoder, so that the UNet stays where it is


def thumbnails(model: LoadedModel, check: Callable[[], None] = lambda: None) -> Draw | None:
    """What draws small pictures; None where that would take minutes.

    Args:
        check: called after every denoising step; it may raise :class:`~sepme.errors.Interrupted`.
    """
    if not bearable(model.device.type, sum(weight.numel() for weight in model.unet.parameters())):
        return None

    def draw(prompt: str, deltas: Sequence[ConceptDelta]) -> Image:
        with torch.no_grad():
            latents = _latents(model, prompt, Composition(tuple(deltas)), check)
        return sd_samplers_common.single_sample_to_image(latents[0].float(), COLOURS)

    return draw


def _latents(model: LoadedModel, prompt: str, composition: Composition, check: Callable[[], None]) -> Tensor:
    """``(1, 4, side, side)``, of one seed."""
    read, strengths = model.encode(["", prompt]), torch.ones(2, len(composition.deltas))
    context, pooled = read.context, read.pooled
    attached: AbstractContextManager[Any] = nullcontext()
    if composition.deltas:
        context = composition.edit_context(read.context, strengths)
        pooled = None if pooled is None else composition.replace_pooled(pooled, read.context, strengths)
    if composition.columns:
        attached = KVProjector(model.attention_layers(), composition).attached(strengths, read.context)
    last = model.latents([0])
    with attached:
        for latents in runs(model, model.schedule, last, context[1:], context[:1], pooled, GLANCE):
            check()
            last = latents
    return last
