"""Concept ablation (AbConcept): the concept's prompts as an anchor's. Kumari et al., arXiv 2303.13516."""

from __future__ import annotations

from torch import Tensor

from .objective import Objective, Step


class Ablation(Objective):
    """``L = Avg( (ε(x_t, c; θ+Δθ) − ε(x_t, c*; θ))² )``, c* the concept's anchor ("painting" for "painting by X")."""

    name = "ablation"
    summary = "trained to draw what the anchor draws (AbConcept)"
    source = "anchor"

    def loss(self, step: Step) -> Tensor:
        target = step.frozen(step.anchor)
        return (step.erased(step.own) - target).square().mean()
