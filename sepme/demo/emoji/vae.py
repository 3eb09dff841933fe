"""The autoencoder of the emoji world: TAESD's layers at half its width, 128 px to latents of 16 x 16 x 4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from .data import BACKGROUND_NAMES, place, random_placement
from .stage import Stage, load_stage

WIDTH = 32
CROP = 64


def build_vae(width: int = WIDTH) -> AutoencoderTiny:
    """Untrained, ``channels_last``."""
    vae = AutoencoderTiny(encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4)
    return vae.to(memory_format=torch.channels_last)


def load_vae(work: Path) -> AutoencoderTiny:
    """The trained one."""
    return load_stage(build_vae(), work, "vae", "vae")


def to_model(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1], ``channels_last``."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def random_picture(renders: NDArray[np.uint8], generator: torch.Generator) -> tuple[Tensor, tuple[int, int, int]]:
    """A thing by a studio on a background, every second time white, and the three indices."""
    things, studios = renders.shape[:2]
    thing, studio, colour, white = (int(torch.randint(n, (1,), generator=generator)) for n in (things, studios, len(BACKGROUND_NAMES), 2))
    colour *= white
    picture = place(renders[thing, studio], BACKGROUND_NAMES[colour], random_placement(generator))
    return picture, (thing, studio, colour)


def train_vae(work: Path, renders: NDArray[np.uint8], steps: int = 2400, batch: int = 8, until: int | None = None) -> None:
    """Train on random crops, which costs a quarter of whole pictures: every layer is a convolution."""
    torch.manual_seed(1)
    vae = build_vae()
    stage = Stage(work, "vae", {"vae": vae}, steps, 2e-3, seed=11)

    def crop() -> Tensor:
        picture, _ = random_picture(renders, stage.generator)
        y, x = (stage.pick(picture.shape[-1] - CROP + 1, 2)).tolist()
        return picture[:, y : y + CROP, x : x + CROP]

    def loss_of(step: int) -> Tensor:
        x = to_model(torch.stack([crop() for _ in range(batch)]))
        z = vae.encoder(x)
        y = vae.decoder(z + 0.06 * torch.randn(z.shape, generator=stage.generator))
        # the denoiser expects latents of zero mean and unit variance
        shape = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        coarse = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        return F.l1_loss(y, x) + coarse + F.mse_loss(y, x) + 0.02 * shape

    stage.run(loss_of, until=until)
