"""Erased Stable Diffusion (ESD): away from the concept by negative guidance. Gandikota et al., arXiv 2303.07345."""

from __future__ import annotations

from torch import Tensor

from .objective import Objective, Step


class ESD(Objective):
    """``L = Avg( (ε(x_t, c; θ+Δθ) − ε*)² )`` with ``ε* = (1 + η) ε(x_t, c_∅; θ) − η ε(x_t, c; θ)``.

    η is :attr:`TrainOptions.guidance`, how far past the empty prompt: 1 as published, 0: the empty prompt itself.
    """

    name = "esd"
    summary = "trained away from the concept by negative guidance"

    def loss(self, step: Step) -> Tensor:
        eta = self.options.guidance
        target = (1 + eta) * step.frozen(step.empty) - eta * step.frozen(step.own)
        return (step.erased(step.own) - target).square().mean()
