"""Forget-Me-Not (FMN): nobody looks at the concept's words. Zhang et al., arXiv 2303.17591."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective, Step


class FMN(Objective):
    """``L = Σ_l ‖A_l‖²``: the attention that image queries pay to the tokens of the concept's own words.

    ``A_l`` are the maps of layer l at those tokens, of all heads and queries; averaged over the batch.
    """

    name = "fmn"
    summary = "trained to pay no attention to the concept's words (Forget-Me-Not)"
    moves, source, reads_words = "attention", "drawn", True

    def loss(self, step: Step) -> Tensor:
        assert step.words is not None
        here = step.words[:, None, None, :]
        squares = [(a * here).square().sum() / len(a) for a in step.attention(step.own)]
        return torch.stack(squares).sum()
