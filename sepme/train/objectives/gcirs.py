"""Generation of concept-irrelevant representations (G-CiRs)."""

from __future__ import annotations

from torch import Tensor

from .objective import Objective, Step


class GCiRs(Objective):
    """Eq. 2: ``L_cor = Avg( r(c; θ+Δθ) ⊙ r(c; θ) )`` with ``r(c; θ) = ε(x_t, c, t; θ) − ε(x_t, c_∅, t; θ)``.

    Where the empty prompt lies in A, the delta leaves ``ε(x_t, c_∅)`` as it is: three passes, one with a graph. Otherwise (mode
    unrestricted) four passes, two with a graph.
    """

    name = "gcirs"
    summary = "trained, erases most (SepME)"
    warm_start, source, settles = True, "drawn", True

    def loss(self, step: Step) -> Tensor:
        empty = step.frozen(step.empty)
        original = step.frozen(step.own) - empty
        return ((step.erased(step.own) - (empty if self.options.protects_empty else step.erased(step.empty))) * original).mean()
