"""Safe self-distillation (SDD): the concept's prompts as the empty prompt. Kim et al., arXiv 2307.05977."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective, Step


class SDD(Objective):
    """``L = Avg( (ε(x_t, c; θ+Δθ) − sg ε(x_t, c_∅; θ+Δθ))² )``, sg: without a gradient.

    Where the empty prompt lies in A, ``ε(x_t, c_∅)`` is the frozen model's; otherwise (mode unrestricted) the student's own.
    """

    name = "sdd"
    summary = "trained to draw what the empty prompt draws"

    def loss(self, step: Step) -> Tensor:
        with torch.no_grad():
            target = step.frozen(step.empty) if self.options.protects_empty else step.erased(step.empty)
        return (step.erased(step.own) - target).square().mean()
