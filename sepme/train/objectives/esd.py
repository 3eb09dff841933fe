"""Erased Stable Diffusion (ESD): away from the concept by negative guidance. Gandikota et al., arXiv 2303.07345."""

from __future__ import annotations

from torch import Tensor

from .step import Step


class ESD:
    """``L = Avg( (ε(x_t, c; θ+Δθ) − ε*)² )`` with ``ε* = (1 + η) ε(x_t, c_∅; θ) − η ε(x_t, c; θ)``.

    Args:
        guidance: η, how far past the empty prompt; 1 as published, 0: the empty prompt itself.
    """

    name, reads_words = "esd", False

    def __init__(self, guidance: float = 1.0) -> None:
        self.guidance = guidance

    def loss(self, step: Step) -> Tensor:
        target = (1 + self.guidance) * step.frozen(step.empty) - self.guidance * step.frozen(step.own)
        return (step.erased(step.own) - target).square().mean()
