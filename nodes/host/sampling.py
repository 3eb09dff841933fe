"""ComfyUI's sampler, called from a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

SAMPLERS: list[str] = list(comfy.samplers.KSampler.SAMPLERS)
SCHEDULERS: list[str] = list(comfy.samplers.KSampler.SCHEDULERS)


class Sampling(NamedTuple):
    """What KSampler asks for beside model, prompts and latents."""

    seed: int = 0
    steps: int = 8
    cfg: float = 4.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"
    denoise: float = 1.0


def sample(
    patcher: Any,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    sampling: Sampling,
    on_step: Callable[[float], None] = lambda done: None,
) -> Tensor:
    """Latents as KSampler makes them, bit by bit.

    Args:
        latent: a LATENT.
        on_step: called with the share that is done, 0 to 1; what it raises stops the run.
    """
    with torch.inference_mode():
        ratios = [latent[key] for key in ("downscale_ratio_spacial", "downscale_ratio_temporal") if key in latent]  # of newer hosts
        start = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], *ratios)
        noise = comfy.sample.prepare_noise(start, sampling.seed, latent.get("batch_index"))
        made: Tensor = comfy.sample.sample(
            patcher, noise, sampling.steps, sampling.cfg, sampling.sampler, sampling.scheduler, positive, negative, start,
            denoise=sampling.denoise, noise_mask=latent.get("noise_mask"), disable_pbar=True, seed=sampling.seed,
            callback=lambda step, x0, x, total: on_step((step + 1) / total),
        )  # fmt: skip
    return made
