"""The autoencoder of the emoji world: TAESD's layers at half its width, 128 px to latents of 16 x 16 x 4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from numpy.typing import NDArray
from torch import Tensor, nn

from .data import BACKGROUND_NAMES, place, random_placement
from .stage import Stage, load_stage

WIDTH = 32
CROP = 64


def build_vae(width: int = WIDTH) -> AutoencoderTiny:
    """Untrained, ``channels_last``."""
    vae = AutoencoderTiny(encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4)
    return vae.to(memory_format=torch.channels_last)


@torch.no_grad()
def begin_with_averages(vae: AutoencoderTiny) -> None:
    """Set the first three channels to carry every patch's mean colour through; the others start at random and learn the detail.

    From random weights alone the net finds light and dark soon, but red and green only after a thousand steps.
    """
    # light, red against green, blue against yellow, scaled to about unit variance; colours are in [0, 1] inside
    into = torch.tensor([[1.8, 1.8, 1.8], [5.0, -5.0, 0.0], [-1.7, -1.7, 3.4]])
    middle = into @ torch.tensor([0.8, 0.75, 0.7])
    point, mean = torch.zeros(3, 3), torch.zeros(3, 3)
    point[1, 1], mean[1:, 1:] = 1, 0.25

    def carry(conv: nn.Conv2d, mix: Tensor, kernel: Tensor, bias: Tensor | None = None) -> None:
        conv.weight[:3] = 0
        conv.weight[:3, :3] = mix[:, :, None, None] * kernel
        if conv.bias is not None:
            conv.bias[:3] = 0 if bias is None else bias

    for net in (vae.encoder, vae.decoder):
        for block in net.modules():
            if isinstance(block, AutoencoderTinyBlock):
                last = block.conv[-1]
                last.weight[:3] = 0
                last.bias[:3] = 0
    same = torch.eye(3)
    first, *halvings, last = (m for m in vae.encoder.layers if isinstance(m, nn.Conv2d))
    carry(first, same, point)
    for conv in halvings:
        carry(conv, same, mean)
    carry(last, into, point, -middle)
    first, *doublings = (m for m in vae.decoder.layers if isinstance(m, nn.Conv2d))
    out = torch.linalg.inv(into)
    carry(first, out, point, out @ middle)
    for conv in doublings:
        carry(conv, same, point)


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


def train_vae(work: Path, renders: NDArray[np.uint8], steps: int = 1700, batch: int = 8, until: int | None = None) -> None:
    """Train on random crops, which costs a quarter of whole pictures: every layer is a convolution."""
    torch.manual_seed(1)
    vae = build_vae()
    begin_with_averages(vae)
    stage = Stage(work, "vae", {"vae": vae}, steps, 1.5e-3, seed=11)

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
        coarse = F.avg_pool2d(y - x, 4)
        return F.l1_loss(y, x) + coarse.abs().mean() + F.mse_loss(y, x) + 0.02 * shape

    stage.run(loss_of, until=until)
