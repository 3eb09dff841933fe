"""Safe self-distillation (SDD): the concept's prompts as the empty prompt. Kim et al., arXiv 2307.05977."""

from __future__ import annotations

from torch import Tensor

from .step import Step


class SDD:
    """``L = Avg( (ε(x_t, c; θ+Δθ) − ε(x_t, c_∅; θ̄))² )``, θ̄ the running average (EMA) of ``θ + Δθ``.

    Args:
        protected: the empty prompt lies in A, so that no average changes ``ε(x_t, c_∅)``: the frozen model is the teacher.
    """

    name, reads_words = "sdd", False

    def __init__(self, protected: bool = True) -> None:
        self.averages = not protected

    def loss(self, step: Step) -> Tensor:
        target = step.teacher(step.empty) if self.averages else step.frozen(step.empty)
        return (step.erased(step.own) - target).square().mean()
