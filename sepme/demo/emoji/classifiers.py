"""The classifier of the emoji world: which thing, whose style and which background a picture shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from ...evaluate.network import Layout, Network
from .data import BACKGROUND_NAMES
from .stage import Stage, load_stage
from .things import STYLES, THINGS, name_of
from .vae import load_vae, random_picture, to_model

HEAD_NAMES = ("thing", "style", "background")
LAYOUT = Layout(widths=(3, 32, 64, 128, 160, 192), strided=3, pool=2, side=128)


def build_classifier(things: int = len(THINGS), styles: int = len(STYLES)) -> Network:
    """An untrained classifier of pictures ``(n, 3, 128, 128)``: which of the first things, which of the first styles, which background."""
    return Network((list(map(name_of, THINGS[:things])), STYLES[:styles], BACKGROUND_NAMES), LAYOUT)


def worn(x: Tensor, vae: AutoencoderTiny, generator: torch.Generator) -> Tensor:
    """Pictures as a generator would draw them: some through the autoencoder, then blurred and noisy by chance."""
    x = x.clone()
    some = len(x) // 8
    with torch.no_grad():
        z = vae.encoder(x[:some])
        x[:some] = vae.decoder(z + 0.1 * torch.randn(z.shape, generator=generator)).clamp(-1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix, noise = torch.rand(2, len(x), 1, 1, 1, generator=generator)
    return x + mix * (blurred - x) + 0.15 * noise.square() * torch.randn(x.shape, generator=generator)


def train_classifier(work: Path, renders: NDArray[np.uint8], steps: int = 5000, batch: int = 32, until: int | None = None) -> None:
    """Train all three heads on placements sampled anew for every step."""
    torch.manual_seed(2)
    model = build_classifier(*renders.shape[:2]).to(memory_format=torch.channels_last)
    stage = Stage(work, "classifier", {"classifier": model}, steps, 1.5e-3, seed=12)
    vae = load_vae(work)

    def loss_of(step: int) -> Tensor:
        pictures, scenes = zip(*(random_picture(renders, stage.generator) for _ in range(batch)), strict=True)
        labels = torch.tensor(scenes)
        images = worn(to_model(torch.stack(pictures)), vae, stage.generator)
        logits = model(images.to(memory_format=torch.channels_last))
        return torch.stack([F.cross_entropy(logit, labels[:, i]) for i, logit in enumerate(logits)]).sum()

    stage.run(loss_of, until=until)


@torch.no_grad()
def held_out(work: Path, renders: NDArray[np.uint8], count: int = 3000, seed: int = 9012) -> dict[str, float]:
    """Accuracy of the three heads on placements that training never saw: plain, and through the autoencoder."""
    model = load_stage(build_classifier(*renders.shape[:2]), work, "classifier", "classifier")
    vae, generator = load_vae(work), torch.Generator().manual_seed(seed)
    right = {"plain": torch.zeros(3), "decoded": torch.zeros(3)}
    for first in range(0, count, 50):
        sampled = (random_picture(renders, generator) for _ in range(min(50, count - first)))
        pictures, scenes = zip(*sampled, strict=True)
        x, labels = to_model(torch.stack(pictures)), torch.tensor(scenes)
        right["plain"] += (model.predict(x) == labels).sum(0)
        right["decoded"] += (model.predict(vae.decoder(vae.encoder(x)).clamp(-1, 1)) == labels).sum(0)
    return {f"{kind} {head}": round(float(row[i]) / count, 4) for kind, row in right.items() for i, head in enumerate(HEAD_NAMES)}
