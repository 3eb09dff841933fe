"""Generation of concept-irrelevant representations (G-CiRs)."""

from __future__ import annotations

from torch import Tensor

from .step import Step


class GCiRs:
    """Eq. 2: ``L_cor = Avg( r(c; θ+Δθ) ⊙ r(c; θ) )`` with ``r(c; θ) = ε(x_t, c, t; θ) − ε(x_t, c_∅, t; θ)``.

    Args:
        protected: the empty prompt lies in A, so the delta leaves ``ε(x_t, c_∅)`` as it is: three passes, one with a graph.
            False (mode unrestricted): four passes, two with a graph.
    """

    name, reads_words = "gcirs", False

    def __init__(self, protected: bool = True) -> None:
        self.protected = protected

    def loss(self, step: Step) -> Tensor:
        nothing = step.frozen(step.empty)
        original = step.frozen(step.own) - nothing
        return ((step.erased(step.own) - (nothing if self.protected else step.erased(step.empty))) * original).mean()
