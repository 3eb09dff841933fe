"""One concept's way through training: what it is trained with, and how far it is."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

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
        options: seed and learning rate, with which it begins.
        pooled: what replaces the concept in the pooled vector, if anything.
        words: where the concept's own words stand in ``own`` ``(prompts, tokens)`` bool, if the objective reads them.
        losses: by step.
        momentum: of its own losses.
        generator: of every draw.
    """

    name: str
    increment: Increment
    source: Source
    own: Encoding
    empty: Encoding
    anchor: Encoding
    options: InitVar[TrainOptions]
    pooled: Pooled | None = None
    words: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    momentum: float = 0.0
    generator: torch.Generator = field(init=False)
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self, options: TrainOptions) -> None:
        self.generator = torch.Generator().manual_seed(options.seed)
        self.optimizer = torch.optim.Adam(self.increment.w.values(), lr=options.learning_rate)
