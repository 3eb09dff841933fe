"""The other kind of model: a transformer that text enters once, to mix with the picture, trained by flow matching on the same latents.

It is a small Lumina 2 (NextDiT, the family of Z-Image too): text passes a norm and one linear layer, is refined, and goes on as tokens
beside the picture's. Its text encoder is the denoiser's, as it came out of that training.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModel

from .diffusion import Average, Batches, even_times
from .stage import Stage, load_stage
from .text import WIDTH, build_text_encoder

LENGTH = 24  # tokens; padding is masked, so that the length does not matter


def build_flow() -> Lumina2Transformer2DModel:
    """An untrained transformer of latents ``(n, 4, 16, 16)``: 64 patches of 2 x 2."""
    return Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=256, num_layers=4, num_refiner_layers=1, num_attention_heads=8,
        num_kv_heads=8, multiple_of=64, axes_dim_rope=(8, 12, 12), axes_lens=(128, 16, 16), cap_feat_dim=WIDTH,
    )  # fmt: skip


def encode(text: CLIPTextModel, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Context ``(n, tokens, WIDTH)`` of token ids, and the mask that ends with each row's first ``end`` token."""
    with torch.no_grad():
        context = text(ids).last_hidden_state
    return context, ((ids == end).cumsum(1) - (ids == end).long()) == 0


def velocity(model: Lumina2Transformer2DModel, x: Tensor, sigma: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Flow from picture to noise, ``noise - picture``; the model itself counts time from noise to picture, as Lumina 2 does."""
    return -model(x, 1 - sigma, context, mask, return_dict=False)[0]


def train_flow(work: Path, batches: Batches, steps: int, rate: float = 1e-3, until: int | None = None) -> None:
    """Train on straight lines from picture to noise; times are logit-normal (Esser et al. 2024)."""
    torch.manual_seed(4)
    model, text = build_flow(), load_stage(build_text_encoder(batches.tokenizer), work, "diffusion", "text_average")
    average = Average({"flow": model})
    # the text encoder is saved beside it: the denoiser may be trained on, which changes its own
    stage = Stage(work, "flow", {"flow": model, "text": text} | average.copies, steps, rate, seed=14)
    end = batches.tokenizer.eos_token_id

    def loss_of(step: int) -> Tensor:
        ids, x = batches.draw(stage.generator, LENGTH)
        context, mask = (part.repeat_interleave(batches.draws, 0) for part in encode(text, ids, end))
        uniform = even_times(len(x), stage.generator).clamp(1e-4, 1 - 1e-4)
        sigma = torch.sigmoid(torch.special.ndtri(uniform))
        noise = torch.randn(x.shape, generator=stage.generator)
        s = sigma[:, None, None, None]
        return (velocity(model, (1 - s) * x + s * noise, sigma, context, mask) - (noise - x)).square().mean()

    stage.run(loss_of, average.update, until)


@torch.no_grad()
def sample(
    model: Lumina2Transformer2DModel, start: Tensor, context: Tensor, mask: Tensor, empty: Tensor, no: Tensor, steps: int, guidance: float
) -> Tensor:
    """Euler's method from noise: latents like ``start``. ``empty``, ``no``: context and mask of the empty caption, a row per picture."""
    x, sigmas = start, torch.linspace(1, 0, steps + 1)
    for now, following in pairwise(sigmas):
        sigma = now.expand(2 * len(x))
        both = velocity(model, torch.cat([x, x]), sigma, torch.cat([empty, context]), torch.cat([no, mask]))
        uncond, cond = both.chunk(2)
        x = x + (following - now) * (uncond + guidance * (cond - uncond))
    return x
