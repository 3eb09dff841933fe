"""What an objective may look at: one draw of ``x_t``, t and prompts, and the passes of the model over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...model.protocols import Encoding

Predict = Callable[[Encoding], Tensor]
Maps = Callable[[Encoding], Sequence[Tensor]]


@dataclass(frozen=True)
class Step:
    """One concept at one draw; a pass is made when it is called.

    Attributes:
        frozen: ε of the frozen model for prompts, without a graph. erased: with the delta, with a graph.
        attention: cross-attention maps ``(batch, heads, queries, tokens)`` of every layer, with the delta and a graph.
        own: the concept's prompts, ``batch`` of them. empty, anchor: the empty prompt and the concept's anchor, as often.
        words: ``(batch, tokens)`` bool, where the concept's own words stand in ``own`` (:attr:`Objective.reads_words`).
    """

    frozen: Predict
    erased: Predict
    attention: Maps
    own: Encoding
    empty: Encoding
    anchor: Encoding
    words: Tensor | None = None


class Objective(Protocol):
    """A scalar loss of one step. One file, one class, one equation.

    Attributes:
        reads_words: whether ``words`` are needed.
    """

    name: str
    reads_words: bool

    def loss(self, step: Step) -> Tensor: ...
