"""Which text encoder made these tokens: a few figures that tell encoders, and layers of one encoder (clip skip), apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..files import text
from .protocols import Encoding, TextEncoder

PROBES = ("a photo of a cat", "an oil painting of a house by the sea", "two people talk about the weather")
FIGURES = 32  # per probe
SAME, RELATED = 0.02, 0.7  # distances up to which it is the encoder itself in any precision, and a fine-tune or another layer of it


@dataclass(frozen=True)
class EncoderFingerprint:
    """Fixed random projections of the mean token of each probe prompt.

    Attributes:
        width: d_in.
        figures: ``(probes * FIGURES,)``, rounded.
    """

    width: int
    figures: tuple[float, ...]
    name: str = ""

    @staticmethod
    def of(encoder: TextEncoder) -> EncoderFingerprint:
        """Read the probe prompts."""
        return replace(EncoderFingerprint.from_encoding(encoder.encode(list(PROBES))), name=str(getattr(encoder, "name", "")))

    @staticmethod
    def from_encoding(encoding: Encoding) -> EncoderFingerprint:
        """From the probe prompts as the encoder reads them. Tokens count by direction alone: some encoders have one of huge norm."""
        context, mask = encoding.context.detach().cpu().double(), encoding.mask.cpu()
        unit = context / context.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        mean = (unit * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        width = context.shape[-1]
        directions = torch.randn(width, FIGURES, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        figures = (mean @ directions).flatten()
        return EncoderFingerprint(width, tuple(round(v, 3) for v in figures.tolist()))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> EncoderFingerprint:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError: the facts are damaged.
        """
        figures = tuple(float(v) for v in data["figures"])
        if len(figures) != FIGURES * len(PROBES):
            raise ValueError("text_encoder")
        return EncoderFingerprint(int(data["width"]), figures, text(data.get("name", "")))

    def to_json(self) -> dict[str, Any]:
        """What a file's header stores; :meth:`from_json` reads it."""
        return {"width": self.width, "figures": list(self.figures)} | ({"name": self.name} if self.name else {})

    def distance(self, other: EncoderFingerprint) -> float:
        """0 for one encoder, about 1.4 for unrelated ones, infinite for other widths."""
        if self.width != other.width:
            return float("inf")
        one, two = self._tensor(), other._tensor()
        return float((one - two).norm() / (one.norm() * two.norm()).sqrt().clamp_min(1e-12))

    def _tensor(self) -> Tensor:
        return torch.tensor(self.figures, dtype=torch.float64)
