"""One forward pass of a model: what the host says of its rows, and what is remembered until it ends."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_cache import CachedBatch, version
from .row_strengths import row_strengths

MAX_SEEN = 8  # contexts known by address; extensions that make a new one in every layer would fill the memory


@dataclass(frozen=True, eq=False)
class Pass:
    """What holds for one forward pass. Nothing of it can be changed from outside.

    Attributes:
        strengths: ``(N,)`` for every row, or ``(rows, N)`` for the rows of the batch; not to be written to while the pass lasts.
        prompts: the batch ``(rows, tokens, d_in)`` that the strengths belong to. None: they belong to whatever rows come.
        default: ``(N,)`` of rows that are no prompt of the batch.
        on_unknown: called where there are such rows.
        state: what keys and values depend on and what does not show in parameters and their version counters.
        unedited: the batch as it was before its context was edited, shape of ``prompts``; None where nothing edited it.
        embedded: whether what projections read is something that the model has made of the batch.
    """

    strengths: Tensor
    prompts: Tensor | None
    default: Tensor
    on_unknown: Callable[[], None]
    state: Hashable
    unedited: Tensor | None = None
    embedded: bool = False
    _asked: set[str] = field(default_factory=set, init=False, repr=False)
    _seen: dict[Hashable, tuple[Tensor, CachedBatch]] = field(default_factory=dict, init=False, repr=False)

    def rows(self, context: Tensor) -> Tensor:
        """Strengths of the rows of a context, which may be others than the batch's: another extension added or split rows."""
        if self.prompts is None or self.embedded:
            return self.strengths
        match = row_strengths(context, self.strengths, self.default, self.prompts)
        if not match.known:
            self.on_unknown()
        return match.strengths

    def source(self, context: Tensor) -> Tensor:
        """What per-layer deltas read of a context: the batch before the context edit, so that several deltas add up."""
        if self.embedded:
            found = self.prompts if self.unedited is None else self.unedited
            assert found is not None
            return found
        return self.unedited if self.unedited is not None and self.unedited.shape == context.shape else context

    def recall(self, name: str, context: Tensor, mode: torch.dtype | None) -> CachedBatch | None:
        """The batch of a context that was met in this pass, known by its address.

        A projection that asks again shows that the model was called again. Then contexts are compared by content once more, so one
        that was written over meanwhile is noticed even in inference mode, where tensors have no version counter.

        Args:
            name: the projection that asks.
            mode: the dtype of autocast, None without it.
        """
        if name in self._asked:
            self._asked.clear()
            self._seen.clear()
        self._asked.add(name)
        seen = self._seen.get(_address(context, mode))
        return None if seen is None else seen[1]

    def remember(self, context: Tensor, mode: torch.dtype | None, batch: CachedBatch) -> None:
        """Note the batch of a context. Holding the context keeps its address from being used again."""
        if len(self._seen) < MAX_SEEN:
            self._seen[_address(context, mode)] = context, batch


def _address(context: Tensor, mode: torch.dtype | None) -> Hashable:
    return context.data_ptr(), context.shape, context.stride(), context.dtype, context.device, version(context), mode
