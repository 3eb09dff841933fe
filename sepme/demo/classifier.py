"""A small classifier of the drawing world: object, style (or plain) and colour of a picture. It judges every erasure."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .world import SMALL, World


class Classifier(nn.Module):
    """Convolutional network with one linear head for each of object, style and colour."""

    def __init__(self, heads: tuple[int, int, int] = SMALL.heads) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2 if i == 0 else 1, padding=2 if i == 0 else 1)]
            layers += [nn.GroupNorm(8, b), nn.ReLU()] + ([nn.MaxPool2d(2)] if i else [])
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(96 * 16, n) for n in heads)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of object, style and colour for images ``(n, 3, 64, 64)`` in [-1, 1]."""
        features = self.features(images)
        return tuple(head(features) for head in self.heads)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class indices ``(n, 3)`` (object, style, colour) of images ``(n, 3, 64, 64)`` in [-1, 1]."""
        return torch.stack([logits.argmax(1) for logits in self(images.float())], dim=1)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sum of the three cross entropies against labels ``(n, 3)``."""
        return torch.stack([F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(self(images))]).sum()


def load_classifier(folder: Path, world: World = SMALL) -> Classifier:
    """Read the classifier of a world's model folder."""
    model = Classifier(world.heads)
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "classifier.safetensors").items()})
    return model.eval().requires_grad_(False)
