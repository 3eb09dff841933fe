"""The flow transformer as a host, to be erased from by its context alone: it has no layers that read the text by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from ...apply.composition import Composition
from ...apply.toggles import Toggles, strengths
from ...checks import check_finite
from ...hosts.diffusers import DiffusersHost
from ...model.protocols import AttentionLayer, Encoding
from ...model.schedule import GLANCE, Sampling, Schedule, ScheduledDenoiser, runs
from .flow import LENGTH, velocity


class FlowHost(ScheduledDenoiser):
    """See :class:`~sepme.model.protocols.AttackHost`; the tokens behind a prompt's end are zero, and the model does not read them.

    Args:
        model: with frozen parameters.
        sibling: the embedded model, whose text encoder and autoencoder it shares.
    """

    free_length = True
    schedule = Schedule.flow()
    latent_shape, device, dtype = (4, 16, 16), torch.device("cpu"), torch.float32

    def __init__(self, model: Lumina2Transformer2DModel, sibling: DiffusersHost) -> None:
        self.model, self.sibling = model, sibling
        self.encoders, self.words, self.decode = sibling.encoders, sibling.words, sibling.decode

    @staticmethod
    def load(folder: Path) -> FlowHost:
        """From the folder that ``python -m sepme.demo.emoji export`` writes, beside the embedded model."""
        model = Lumina2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        return FlowHost(model.eval().requires_grad_(False), DiffusersHost.load("demo"))

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Encoding:
        """Of the embedded model's encoding what this one was trained on: ``LENGTH`` tokens, to the end of the prompt."""
        context, mask, _ = self.sibling.encode(prompts, grad)
        mask = mask[:, :LENGTH]
        return Encoding(context[:, :LENGTH] * mask[..., None], mask)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """``noise - picture``."""
        return velocity(self.model, x, self.schedule.s[t], context, context.detach().ne(0).any(dim=-1))

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return {}

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        composition: Composition | None = None,
        toggles: Toggles | None = None,
        *,
        negative: str = "",
        steps: int = GLANCE.steps,
        guidance: float = GLANCE.guidance,
        gate: bool = True,
        latents_only: bool = False,
    ) -> Tensor:
        """Images ``(n, 3, 128, 128)`` in [-1, 1], or latents ``(n, 4, 16, 16)``, one per prompt and seed."""
        both = torch.cat([self.encode([negative]).context.expand(len(prompts), -1, -1), self.encode(prompts).context])
        if composition is not None:
            both = composition.edit_context(both, strengths([toggles or {}] * len(both), composition.deltas), gate)
        empty, context = both.chunk(2)
        with torch.no_grad():
            *_, latents = runs(self, self.schedule, self.latents(seeds), context, empty, None, Sampling(steps, guidance))
        check_finite(latents, "transformer", "the last step")
        return latents if latents_only else self.decode(latents)
