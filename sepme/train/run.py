"""One concept's way through training: what it is trained with, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.protocols import Encoding
from ..plan.pooled import Pooled
from .increment import Increment
from .options import TrainOptions
from .source import Source


@dataclass
class ConceptRun:
    """The state of one concept's training.

    Attributes:
        increment: what is trained.
        source: where x_t comes from.
        own: the concept's prompts.
        empty: the empty prompt, one row.
        anchor: the concept's anchor, one row.
        generator: of every draw.
        losses: by step.
        momentum: of its own losses.
        pooled: what replaces the concept in the pooled vector, if anything.
        words: where the concept's own words stand in ``own`` ``(prompts, tokens)`` bool, if the objective reads them.
    """

    name: str
    increment: Increment
    source: Source
    own: Encoding
    empty: Encoding
    anchor: Encoding
    generator: torch.Generator
    optimizer: torch.optim.Adam
    losses: list[float] = field(default_factory=list)
    momentum: float = 0.0
    pooled: Pooled | None = None
    words: Tensor | None = None

    @staticmethod
    def start(
        name: str, increment: Increment, source: Source, own: Encoding, empty: Encoding, options: TrainOptions, **more: Any
    ) -> ConceptRun:
        """A run before its first step; ``more`` are the attributes that have defaults, and ``anchor`` (the empty prompt)."""
        optimizer = torch.optim.Adam(increment.w.values(), lr=options.learning_rate)
        generator = torch.Generator().manual_seed(options.seed)
        return ConceptRun(name, increment, source, own, empty, more.pop("anchor", empty), generator, optimizer, **more)
