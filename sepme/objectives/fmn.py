"""Forget-Me-Not (FMN): nobody looks at the concept's words. Zhang et al., arXiv 2303.17591."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Step


class FMN:
    """``L = Avg_l ‖A_l‖²``: the attention that image queries pay to the tokens of the concept's own words.

    ``A_l`` are the maps of layer l at those tokens; the squares are summed over the tokens and averaged over batch, heads and queries.
    """

    name, averages, reads_words = "fmn", False, True

    def loss(self, step: Step) -> Tensor:
        assert step.words is not None
        here = step.words[:, None, None, :]
        squares = [(a * here).square().sum(-1).mean() for a in step.attention(step.own)]
        return torch.stack(squares).mean()
