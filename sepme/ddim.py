"""DDIM with guidance, written for the protocols, for hosts that bring no scheduler of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .protocols import Denoiser


def timesteps(steps: int, total: int) -> Tensor:
    """``(steps,)`` int64, descending: every ``total / steps``-th training timestep, shifted by one as Stable Diffusion does."""
    return (torch.arange(steps) * (total // steps)).flip(0) + 1


def runs(
    denoiser: Denoiser, alphas: Tensor, start: Tensor, context: Tensor, empty: Tensor, extra: Tensor | None, steps: int, guidance: float
) -> Iterator[Tensor]:
    """Denoising runs: the start latents, then the latents after every step.

    Args:
        alphas: cumulative ``ᾱ_t`` ``(timesteps,)``. start: ``(batch, ...)``.
        context, empty: ``(batch, tokens, d_in)``. extra: pooled vectors of ``[empty; context]``.
    """
    alphas = alphas.to(start.device, torch.float32)
    both, x = torch.cat([empty, context]), start
    yield x
    times = timesteps(steps, len(alphas)).tolist()
    for t, following in zip(times, [*times[1:], 0], strict=True):
        batch = torch.full((2 * len(x),), t, device=x.device)
        nothing, something = denoiser.predict(torch.cat([x, x]), batch, both, extra).float().chunk(2)
        noise = nothing + guidance * (something - nothing)
        clean = (x.float() - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        x = (alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * noise).to(start.dtype)
        yield x
