"""Generation of concept-irrelevant representations (G-CiRs)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..protocols import Encoding


class GCiRs:
    """Eq. 2: ``L_cor = Avg( r(c; θ+Δθ) ⊙ r(c; θ) )`` with ``r(c; θ) = ε(x_t, c, t; θ) − ε(x_t, c_∅, t; θ)``.

    Args:
        protected: the empty prompt lies in A, so the delta leaves ``ε(x_t, c_∅)`` as it is: three passes, one with a graph.
            False (mode unrestricted): four passes, two with a graph.
    """

    name = "gcirs"

    def __init__(self, protected: bool = True) -> None:
        self.protected = protected

    def loss(
        self, frozen: Callable[[Encoding], Tensor], erased: Callable[[Encoding], Tensor], context: Encoding, empty: Encoding
    ) -> Tensor:
        nothing = frozen(empty)
        original = frozen(context) - nothing
        return ((erased(context) - (nothing if self.protected else erased(empty))) * original).mean()
