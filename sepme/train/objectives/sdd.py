"""Safe self-distillation (SDD): the concept's prompts as the empty prompt. Kim et al., arXiv 2307.05977."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Step


class SDD:
    """``L = Avg( (ε(x_t, c; θ+Δθ) − sg ε(x_t, c_∅; θ+Δθ))² )``, sg: without a gradient.

    Args:
        protected: the empty prompt lies in A, so that ``ε(x_t, c_∅)`` is the frozen model's. False (mode unrestricted): the student's own.
    """

    name, reads_words = "sdd", False

    def __init__(self, protected: bool = True) -> None:
        self.protected = protected

    def loss(self, step: Step) -> Tensor:
        with torch.no_grad():
            target = step.frozen(step.empty) if self.protected else step.erased(step.empty)
        return (step.erased(step.own) - target).square().mean()
