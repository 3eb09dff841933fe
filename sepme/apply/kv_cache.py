"""Keys and values of earlier denoising steps: found by the content of their prompts, the least recently used let go of first."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .composition import Touch

MAX_BATCHES = 32  # a comparison looks at all of them
LEAST, SHARE = 256 << 20, 16  # bytes that may be held: so many, and of large models one in so many of their own


@dataclass(eq=False)
class CachedBatch:
    """Keys and values of one batch of prompts.

    Attributes:
        context: ``(rows, tokens, d_in)``, a copy.
        strengths: of its rows, a copy.
        key: whatever else keys and values depend on.
        touch: what the batch meets of the composition.
        outputs: by projection name, the :func:`fingerprint` of the module, and keys or values.
        bytes: of all these tensors.
    """

    context: Tensor
    strengths: Tensor
    key: Hashable
    touch: Touch
    outputs: dict[str, tuple[Hashable, Tensor]] = field(default_factory=dict, init=False)
    bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.context, self.strengths = self.context.detach().clone(), self.strengths.detach().clone()
        self.drop()

    def get(self, name: str, made_by: Hashable) -> Tensor | None:
        """Keys or values made by a module in this state; None where there are none."""
        found = self.outputs.get(name)
        return None if found is None or found[0] != made_by else _lent(found[1])

    def put(self, name: str, made_by: Hashable, output: Tensor) -> Tensor:
        """Store keys or values.

        Returns:
            what to hand out.
        """
        if name in self.outputs:
            self.bytes -= _bytes(self.outputs[name][1])
        self.outputs[name] = made_by, output
        self.bytes += _bytes(output)
        return _lent(output)

    def drop(self) -> None:
        """Let go of keys and values."""
        self.outputs.clear()
        self.bytes = _bytes(self.context) + _bytes(self.touch.h)


class KVCache:
    """Batches of prompts, the most recently used last.

    Args:
        max_bytes: cap on what is held; below the size of one batch no keys and values are held at all.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.comparisons = 0
        self._batches: list[CachedBatch] = []

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def bytes(self) -> int:
        """Memory that all batches take."""
        return sum(b.bytes for b in self._batches)

    def clear(self) -> None:
        """Forget everything."""
        self._batches.clear()

    def get(self, context: Tensor, strengths: Tensor, key: Hashable) -> CachedBatch | None:
        """The batch with this content. All candidates are compared before any answer is waited for: one wait for the GPU."""
        self.comparisons += 1
        candidates, answers = [], []
        for batch in reversed(self._batches):
            held = batch.context
            if (held.shape, held.dtype, held.device, batch.key) != (context.shape, context.dtype, context.device, key):
                continue
            if (batch.strengths.shape, batch.strengths.device) != (strengths.shape, strengths.device):
                continue
            equal = (batch.strengths == strengths).all()
            if strengths.device == context.device:
                equal = equal & (held == context).all()
            elif equal:
                equal = (held == context).all()
            else:
                continue
            candidates.append(batch)
            answers.append(equal)
        if not answers:
            return None
        return next((b for b, same in zip(candidates, torch.stack(answers).tolist(), strict=True) if same), None)

    def put(self, batch: CachedBatch) -> None:
        """Hold a batch as the most recently used one, and let go of what is over the limits."""
        if batch in self._batches:
            self._batches.remove(batch)
        self._batches.append(batch)
        del self._batches[:-MAX_BATCHES]
        over = self.bytes - self.max_bytes
        while over > 0 and self._batches[0] is not batch:
            over -= self._batches.pop(0).bytes
        if over > 0:
            batch.drop()


def room(model: nn.Module) -> int:
    """Bytes of keys and values that may be held beside a model: a sixteenth of its weights, at least 256 MiB.

    That is two prompts and more of every published model in half precision; of Wan 14B, whose keys and values have 400 MiB a prompt of 512
    tokens, four.
    """
    return max(LEAST, sum(p.numel() * p.element_size() for p in model.parameters()) // SHARE)


def fingerprint(module: nn.Module) -> Hashable:
    """What changes when a projection's parameters are replaced, moved, cast or written to, or PEFT's adapters switched.

    Writes that go past PyTorch's version counter (``.data``, inference mode) do not show: hosts name those in :attr:`Pass.state`.
    """
    parameters: list[Any] = list(module._parameters.values()) if not module._modules else list(module.parameters())
    state = tuple((weakref.ref(p), _address(p), version(p), p.dtype, p.device) for p in parameters if p is not None)
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


def _lent(tensor: Tensor) -> Tensor:
    """The same memory, until somebody writes into it by whatever way, ``.data`` too: then PyTorch gives the writer a copy."""
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that is not PyTorch's own
        return tensor.clone()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def version(tensor: Tensor) -> int | None:
    """The in-place version counter; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version
