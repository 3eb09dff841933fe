"""A small convolutional classifier with several heads, and its file: weights, and each head's labels in the header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..files import safetensors_bytes, write_atomically

FILE = "classifier.safetensors"  # beside the model whose pictures it reads


class Layout(NamedTuple):
    """The shape of a network.

    Attributes:
        widths: channels, the picture's first.
        strided: so many layers halve the side by their stride, the others by pooling.
        pool: side of the last average.
        side: of pictures.
    """

    widths: tuple[int, ...] = (3, 24, 48, 96, 96)
    strided: int = 1
    pool: int = 1
    side: int = 64

    @property
    def features(self) -> int:
        """What a head reads."""
        return self.widths[-1] * (self.side // 2 ** (len(self.widths) - 1) // self.pool) ** 2


class Network(nn.Module):
    """One linear head per kind of label, on common features.

    Args:
        labels: names by head; a name stands in one head only.
    """

    def __init__(self, labels: Sequence[Sequence[str]], layout: Layout = Layout()) -> None:  # noqa: B008 (a tuple)
        super().__init__()
        self.labels, self.layout = tuple(tuple(names) for names in labels), layout
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(layout.widths)):
            kernel, stride = 5 if i == 0 else 3, 2 if i < layout.strided else 1
            layers += [nn.Conv2d(a, b, kernel, stride=stride, padding=kernel // 2), nn.GroupNorm(8, b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if stride == 1 else []
        self.features = nn.Sequential(*layers, nn.AvgPool2d(layout.pool))
        self.heads = nn.ModuleList(nn.Linear(layout.features, len(names)) for names in self.labels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits by head for images ``(n, 3, side, side)`` in [-1, 1]."""
        features = self.features(images).flatten(1)
        return tuple(head(features) for head in self.heads)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features of 2 x 2 regions ``(n, d)`` float32 of images ``(n, 3, side, side)`` in [-1, 1]."""
        return F.adaptive_avg_pool2d(self.features(images.float()), 2).flatten(1)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class indices ``(n, heads)`` of images ``(n, 3, side, side)`` in [-1, 1]."""
        return torch.stack([logits.argmax(1) for logits in self(images.float())], dim=1)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sum of the heads' cross entropies against class indices ``(n, heads)``."""
        return torch.stack([F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(self(images))]).sum()

    def place_of(self, name: str) -> tuple[int, int]:
        """Head and class of a label.

        Raises:
            KeyError: no head has it.
        """
        for head, names in enumerate(self.labels):
            if name in names:
                return head, names.index(name)
        raise KeyError(name)

    def save(self, folder: Path) -> None:
        """Write the weights in float16."""
        tensors = {k: v.detach().half().contiguous() for k, v in self.state_dict().items()}
        write_atomically(folder / FILE, safetensors_bytes(tensors, {"labels": json.dumps(self.labels), "layout": json.dumps(self.layout)}))

    @staticmethod
    def load(folder: Path) -> Network:
        """Read the classifier that lies beside a model; frozen, float32."""
        with safe_open(folder / FILE, framework="pt") as file:
            header = file.metadata()
            widths, *rest = json.loads(header["layout"]) if "layout" in header else Layout()
            network = Network(json.loads(header["labels"]), Layout(tuple(widths), *rest))
            network.load_state_dict({k: file.get_tensor(k).float() for k in file.keys()})  # noqa: SIM118 (not a dict)
        return network.eval().requires_grad_(False)
