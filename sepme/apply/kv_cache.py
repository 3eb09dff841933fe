"""Keys and values kept across denoising steps: found by content, by one comparison a forward pass, least recently used out first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .composition import Touch

MAX_BATCHES = 32  # a comparison looks at all of them
MAX_SEEN = 8  # contexts of one forward pass known by address; extensions that make one a layer would fill the memory


@dataclass(eq=False)
class Batch:
    """What is kept of one prompt batch.

    Attributes:
        context: ``(rows, tokens, d_in)``, a copy. strengths: a copy. key: whatever else keys and values depend on.
        touch: what the batch meets of the composition.
        outputs: by projection name, keys or values and the :func:`fingerprint` of the module that made them.
    """

    context: Tensor
    strengths: Tensor
    key: Hashable
    touch: Touch
    outputs: dict[str, tuple[Hashable, Tensor]] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class _Seen:
    """A context met in this forward pass. Holding it keeps its address from being used again."""

    context: Tensor
    strengths: Tensor
    versions: tuple[int | None, int | None]
    key: Hashable
    batch: Batch


class Kept:
    """Prompt batches, most recently used last.

    Args:
        max_bytes: cap on what is kept; a cap below one batch keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.comparisons = 0
        self._batches: list[Batch] = []
        self._seen: dict[tuple[Any, ...], _Seen] = {}
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self._batches)

    def clear(self) -> None:
        """Forget everything."""
        self._batches.clear()
        self.begin_pass()

    def begin_pass(self) -> None:
        """Another forward pass begins: contexts are compared by content again."""
        self._names.clear()
        self._seen.clear()

    def find(
        self,
        name: str,
        context: Tensor,
        given: Tensor,
        key: Hashable,
        strengths: Callable[[Tensor], Tensor],
        touch: Callable[[Tensor, Tensor], Touch],
    ) -> Batch:
        """The batch of this context: by identity within a forward pass, by content across passes.

        A projection that asks again starts another pass, so a context that was written over between two passes is noticed even in
        inference mode, where tensors have no version counter.

        Args:
            name: the projection that asks. given: the strengths of this pass.
            strengths: those of the context's rows; called where the address is not known. touch: called where the batch is new.
        """
        if name in self._names:
            self.begin_pass()
        self._names.add(name)
        where = (context.data_ptr(), context.shape, context.stride(), context.dtype, context.device)
        versions = (_version(context), _version(given))
        seen = self._seen.get(where)
        if seen is not None and seen.strengths is given and seen.versions == versions and seen.key == key:
            return seen.batch
        rows = strengths(context)
        batch = self._same(context, rows, key)
        if batch is None:
            made = touch(context, rows)
            batch = Batch(context.detach().clone(), rows.detach().clone(), key, made)
            batch.bytes = _bytes(batch.context) + _bytes(made.h)
        else:
            self._batches.remove(batch)
        self._batches.append(batch)
        del self._batches[:-MAX_BATCHES]
        if len(self._seen) < MAX_SEEN or where in self._seen:
            self._seen[where] = _Seen(context, given, versions, key, batch)
        return batch

    def store(self, batch: Batch, name: str, made_by: Hashable, output: Tensor) -> None:
        """Keep an output, and let go of what is over the cap."""
        if name in batch.outputs:
            batch.bytes -= _bytes(batch.outputs[name][1])
        batch.outputs[name] = (made_by, output)
        batch.bytes += _bytes(output)
        over = self.bytes - self.max_bytes
        while over > 0 and self._batches[0] is not batch:
            over -= self._batches.pop(0).bytes
        if over > 0:
            batch.bytes -= sum(_bytes(out) for _, out in batch.outputs.values())
            batch.outputs.clear()

    def _same(self, context: Tensor, strengths: Tensor, key: Hashable) -> Batch | None:
        """The kept batch with this content. All candidates are compared before any answer is waited for: one wait a call."""
        self.comparisons += 1
        candidates, answers = [], []
        for batch in reversed(self._batches):
            kept = batch.context
            if (kept.shape, kept.dtype, kept.device, batch.key) != (context.shape, context.dtype, context.device, key):
                continue
            if (batch.strengths.shape, batch.strengths.device) != (strengths.shape, strengths.device):
                continue
            equal = (batch.strengths == strengths).all()
            if strengths.device == context.device:
                equal = equal & (kept == context).all()
            elif equal:
                equal = (kept == context).all()
            else:
                continue
            candidates.append(batch)
            answers.append(equal)
        if not answers:
            return None
        return next((b for b, same in zip(candidates, torch.stack(answers).tolist(), strict=True) if same), None)


def fingerprint(module: nn.Module) -> Hashable:
    """What changes when a projection's parameters are replaced, moved, cast or written to, or PEFT's adapters switched.

    Writes that go past PyTorch's version counter (``.data``, inference mode) do not show: hosts name those in ``KVProjector.state``.
    """
    parameters: list[Any] = list(module._parameters.values()) if not module._modules else list(module.parameters())
    state = tuple((weakref.ref(p), _address(p), _version(p), p.dtype, p.device) for p in parameters if p is not None)
    return (weakref.ref(module), state, _adapters(module) if module._modules else None)


def _adapters(module: nn.Module) -> Hashable:
    """Which PEFT adapters act, and how strongly."""
    found = [getattr(module, n, None) for n in ("active_adapters", "merged_adapters", "disable_adapters", "scaling")]
    return repr(found)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # quantised and other wrapped tensors have none
        return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int | None:
    """The in-place version counter; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version
