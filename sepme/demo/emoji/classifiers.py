"""The classifier of the emoji world: which thing, whose style and which background a picture shows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from .data import BACKGROUND_NAMES
from .stage import Stage, load_stage
from .things import STYLES, THINGS
from .vae import load_vae, random_picture, to_model

HEADS = (len(THINGS), len(STYLES), len(BACKGROUND_NAMES))
HEAD_NAMES = ("thing", "style", "background")
WIDTHS = (3, 24, 48, 96, 128, 160)


class SceneClassifier(nn.Module):
    """A convolutional network with one linear head for each of thing, style and background."""

    def __init__(self, heads: tuple[int, ...] = HEADS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(WIDTHS)):
            size, stride = (5, 2) if i == 0 else (3, 2 if i < 3 else 1)
            layers += [nn.Conv2d(a, b, size, stride=stride, padding=size // 2), nn.GroupNorm(8, b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if stride == 1 else []
        self.features = nn.Sequential(*layers, nn.AvgPool2d(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTHS[-1] * 4, n) for n in heads)

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(n, 640)`` of images ``(n, 3, 128, 128)`` in [-1, 1]."""
        return self.features(images.to(memory_format=torch.channels_last)).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of thing, style and background for images ``(n, 3, 128, 128)`` in [-1, 1]."""
        features = self.embed(images)
        return tuple(head(features) for head in self.heads)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class indices ``(n, 3)`` (thing, style, background) of images ``(n, 3, 128, 128)`` in [-1, 1]."""
        return torch.stack([logits.argmax(1) for logits in self(images.float())], dim=1)


def load_classifier(folder: Path) -> SceneClassifier:
    """Read a model folder's classifier."""
    state = {k: v.float() for k, v in load_file(folder / "classifier.safetensors").items()}
    model = SceneClassifier(tuple(state[f"heads.{i}.bias"].numel() for i in range(3)))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def worn(x: Tensor, vae: AutoencoderTiny, generator: torch.Generator) -> Tensor:
    """Pictures as a generator would draw them: some through the autoencoder, then blurred and noisy by chance."""
    x = x.clone()
    some = len(x) // 16
    with torch.no_grad():
        z = vae.encoder(x[:some])
        x[:some] = vae.decoder(z + 0.1 * torch.randn(z.shape, generator=generator)).clamp(-1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix, noise = torch.rand(2, len(x), 1, 1, 1, generator=generator)
    return x + mix * (blurred - x) + 0.15 * noise.square() * torch.randn(x.shape, generator=generator)


def train_classifier(work: Path, renders: NDArray[np.uint8], steps: int = 5000, batch: int = 32, until: int | None = None) -> None:
    """Train all three heads on placements sampled anew for every step."""
    torch.manual_seed(2)
    model = SceneClassifier((renders.shape[0], renders.shape[1], len(BACKGROUND_NAMES))).to(memory_format=torch.channels_last)
    stage = Stage(work, "classifier", {"classifier": model}, steps, 1.5e-3, seed=12)
    vae = load_vae(work)

    def loss_of(step: int) -> Tensor:
        pictures, scenes = zip(*(random_picture(renders, stage.generator) for _ in range(batch)), strict=True)
        labels = torch.tensor(scenes)
        logits = model(worn(to_model(torch.stack(pictures)), vae, stage.generator))
        return torch.stack([F.cross_entropy(logit, labels[:, i]) for i, logit in enumerate(logits)]).sum()

    stage.run(loss_of, until=until)


@torch.no_grad()
def held_out(work: Path, renders: NDArray[np.uint8], count: int = 3000, seed: int = 9012) -> dict[str, float]:
    """Accuracy of the three heads on placements that training never saw: plain, and through the autoencoder."""
    model = load_stage(SceneClassifier((renders.shape[0], renders.shape[1], len(BACKGROUND_NAMES))), work, "classifier", "classifier")
    vae, generator = load_vae(work), torch.Generator().manual_seed(seed)
    right = {"plain": torch.zeros(3), "decoded": torch.zeros(3)}
    for first in range(0, count, 50):
        sampled = (random_picture(renders, generator) for _ in range(min(50, count - first)))
        pictures, scenes = zip(*sampled, strict=True)
        x, labels = to_model(torch.stack(pictures)), torch.tensor(scenes)
        right["plain"] += (model.predict(x) == labels).sum(0)
        right["decoded"] += (model.predict(vae.decoder(vae.encoder(x)).clamp(-1, 1)) == labels).sum(0)
    return {f"{kind} {head}": round(float(row[i]) / count, 4) for kind, row in right.items() for i, head in enumerate(HEAD_NAMES)}
