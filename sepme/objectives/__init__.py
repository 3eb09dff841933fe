"""Training objectives: one file, one class, one equation each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .gcirs import GCiRs

Predict = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """A loss of one concept at one draw of ``x_t``, t and prompts."""

    name: str

    def loss(self, frozen: Predict, erased: Predict, context: Tensor, empty: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            frozen: ε of the frozen model for a context, without a graph. erased: the same with the delta, with a graph.
            context: the concept's prompts ``(batch, tokens, d_in)``. empty: the empty prompt's, same shape.
        """
        ...


# built with protected=True where the empty prompt lies in A
OBJECTIVES: dict[str, Callable[..., Objective]] = {"gcirs": GCiRs}
