"""Patched projections: the host's own keys and values, a delta added in touched rows, kept across steps."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .composition import Composition, Touch
from .layers import projections, shapes, weight_of
from .ops import add_to_rows
from .protocols import AttentionLayer

Forward = Callable[[Tensor], Tensor]


@contextmanager
def patched(modules: Mapping[str, nn.Module], wrap: Callable[[str, nn.Module, Forward], Forward]) -> Iterator[None]:
    """Replace ``module.forward`` by ``wrap(name, module, forward)`` and leave the modules as they were found."""
    found: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in modules.items():
            found.append((module, module.__dict__.get("forward")))
            module.forward = wrap(name, module, module.forward)
        yield
    finally:
        for module, forward in reversed(found):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@dataclass
class _Kept:
    """Keys and values of one prompt batch under one set of strengths."""

    context: Tensor
    strengths: Tensor
    touch: Touch
    outputs: dict[str, tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(out.numel() * out.element_size() for _, out in self.outputs.values())


class KVProjector:
    """Applies a composition to a model's cross-attention while it is attached.

    Untouched rows (gate closed or strength 0) are the host's own result at the host's own batch shape, bit for bit.

    Args:
        layers: cross-attention modules by canonical name.
        composition: the deltas. gate: False applies purely linear deltas.
        keep: keep keys and values across steps (same prompt, strengths and weights). max_bytes: cap on what is kept.
    """

    def __init__(
        self,
        layers: Mapping[str, AttentionLayer],
        composition: Composition,
        gate: bool = True,
        keep: bool = True,
        max_bytes: int = 256 << 20,
    ) -> None:
        self.modules = projections(layers)
        self.composition, self.gate, self.keep, self.max_bytes = composition, gate, keep, max_bytes
        for delta in composition.deltas[:1]:
            delta.check_fits(shapes(layers))
        self.strengths = torch.ones(len(composition.deltas))
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._seen: tuple[weakref.ref[Tensor], Any, Tensor, _Kept] | None = None
        self._count = 0

    @contextmanager
    def attached(self, strengths: Tensor | None = None) -> Iterator[KVProjector]:
        """Patch the model inside the block.

        Args:
            strengths: ``(N,)`` for every row, or ``(rows, N)`` for the rows of the batch; all 1 by default.
        """
        if strengths is not None:
            self.strengths = strengths
        try:
            with patched(self.modules, self._wrap):
                yield self
        finally:
            self.clear()

    def clear(self) -> None:
        """Forget all keys and values."""
        self._kept.clear()
        self._seen = None

    @property
    def kept_bytes(self) -> int:
        return sum(entry.bytes for entry in self._kept.values())

    def _wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        def project(context: Tensor) -> Tensor:
            if torch.is_grad_enabled() or not self.keep:
                touch = self.composition.touch(context, self.strengths, self.gate)
                return self._compute(name, forward, context, touch)
            entry = self._entry(context)
            weight = weight_of(module)
            state = (weight.data_ptr(), _version(weight), weight.dtype)
            hit = entry.outputs.get(name)
            if hit is None or hit[0] != state:
                hit = entry.outputs[name] = (state, self._compute(name, forward, context, entry.touch))
                self._shrink(entry)
            return hit[1]

        return project

    def _compute(self, name: str, forward: Forward, context: Tensor, touch: Touch) -> Tensor:
        out = forward(context)
        if len(touch.rows) == 0:
            return out
        up = self.composition.up(name, touch.concepts).to(out.device)
        return add_to_rows(out, touch.h, up, touch.rows)

    def _entry(self, context: Tensor) -> _Kept:
        """What is kept for this context: by identity within a forward pass, by content across passes."""
        version = _version(context)
        if self._seen is not None:
            reference, seen_version, strengths, entry = self._seen
            if reference() is context and version is not None and seen_version == version and strengths is self.strengths:
                return entry
        for key, entry in self._kept.items():
            same = entry.context.shape == context.shape and entry.context.dtype == context.dtype and entry.context.device == context.device
            if same and torch.equal(entry.strengths, self.strengths) and torch.equal(entry.context, context):
                self._kept.move_to_end(key)
                break
        else:
            touch = self.composition.touch(context, self.strengths, self.gate)
            entry = _Kept(context.detach().clone(), self.strengths.clone(), touch)
            self._count += 1
            self._kept[self._count] = entry
        self._seen = (weakref.ref(context), version, self.strengths, entry)
        return entry

    def _shrink(self, newest: _Kept) -> None:
        while self.kept_bytes > self.max_bytes:
            key, oldest = next(iter(self._kept.items()))
            if oldest is newest:
                newest.outputs.clear()
                return
            del self._kept[key]


def _version(tensor: Tensor) -> int | None:
    """The in-place version counter; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version
