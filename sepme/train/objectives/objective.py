"""What an objective declares and what it may look at: one draw of ``x_t``, t and prompts, and the passes of the model over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ...model.protocols import Encoding

if TYPE_CHECKING:
    from ..options import TrainOptions

PromptNoise = Callable[[Encoding], Tensor]
Maps = Callable[[Encoding], Sequence[Tensor]]
Read = Callable[[Tensor], Tensor]  # tokens ``(n, d_in)`` to what layers read of them


@dataclass(frozen=True)
class Step:
    """One concept at one draw; a pass is made when it is called.

    Attributes:
        frozen: ε of the frozen model for prompts, without a graph.
        erased: with the delta, with a graph.
        attention: cross-attention maps ``(batch, heads, queries, tokens)`` of every layer, with the delta and a graph.
        own: the concept's prompts, ``batch`` of them.
        empty: the empty prompt, as often.
        anchor: the concept's anchor, as often.
        words: ``(batch, tokens)`` bool, where the concept's own words stand in ``own`` (:attr:`Objective.reads_words`).
    """

    frozen: PromptNoise
    erased: PromptNoise
    attention: Maps
    own: Encoding
    empty: Encoding
    anchor: Encoding
    words: Tensor | None = None


class Objective:
    """What fills a concept's increment: a loss that is minimised, or a system that is solved. One file, one class, one equation.

    Args:
        options: of the training; an objective reads what concerns it and keeps it.

    Attributes:
        name: as options, files and menus have it.
        summary: half a sentence for menus and help, without a full stop.
        trained: True: by :meth:`loss`, step by step against the frozen model. False: by :meth:`solve`, without sampling.
        moves: ``prediction`` (what the model predicts) or ``attention`` (what keys decide, and values have no part in).
        warm_start: whether mode subspace starts from the closed form unless told otherwise.
        source: what x_t is made of where the objective was published (:attr:`TrainOptions.source`).
        reads_words: whether it looks at :attr:`Step.words`.
        settles: whether its loss reaches 0, so that the momentum stop ends training before the steps do.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    trained: ClassVar[bool] = True
    moves: ClassVar[str] = "prediction"
    warm_start: ClassVar[bool] = False
    source: ClassVar[str] = "trajectory"
    reads_words: ClassVar[bool] = False
    settles: ClassVar[bool] = False

    def __init__(self, options: TrainOptions) -> None:
        self.options = options

    def loss(self, step: Step) -> Tensor:
        """The scalar loss of one step, with a graph."""
        raise NotImplementedError(f"{self.name} is not trained.")

    def solve(
        self, weights: Mapping[str, Tensor], tokens: Tensor, target: Tensor, down: Tensor, read: Read | None = None
    ) -> dict[str, Tensor]:
        """Up-factors ``(d_out, k)`` by projection name; arguments as for :func:`~sepme.train.objectives.closed_form.solve`."""
        raise NotImplementedError(f"{self.name} is trained.")
