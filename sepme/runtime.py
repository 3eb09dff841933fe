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
SEEN = 8  # contexts of one forward pass known by address; extensions that make one a layer would fill the memory


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
    outputs: dict[str, tuple[weakref.ref[Tensor], Any, Tensor]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        tensors = [self.context, self.touch.h, *(out for _, _, out in self.outputs.values())]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class _Pass:
    """One forward pass of a host that leaves the patch in place.

    Attributes:
        prompts: the batch ``(rows, tokens, d_in)`` that the strengths belong to. default: ``(N,)`` of rows found in no prompt.
        seen: contexts met in this pass, by address; they are held, so that no other tensor gets the address.
    """

    prompts: Tensor | None
    default: Tensor
    on_unknown: Callable[[], None]
    seen: dict[tuple[Any, ...], tuple[Tensor, _Kept]] = field(default_factory=dict)

    def strengths(self, context: Tensor, given: Tensor) -> Tensor:
        """Strengths of the rows of a context, which may be others than the batch's: another extension added or split rows."""
        if given.dim() == 1 or len(given) == len(context):
            return given
        if bool((given == self.default).all()):
            return self.default
        table = self.default.repeat(len(context), 1)
        found = torch.zeros(len(context), dtype=torch.bool, device=context.device)
        if self.prompts is not None:
            tokens = min(context.shape[1], self.prompts.shape[1])
            same = (context[:, None, :tokens] == self.prompts[None, :, :tokens].to(context)).flatten(2).all(dim=2)
            found = same.any(dim=1)
            table[found.cpu()] = given[same.int().argmax(dim=1)[found].cpu()]
        if not bool(found.all()):
            self.on_unknown()
        return table


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
        self.strengths: Tensor | None = torch.ones(len(composition.deltas))
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._seen: tuple[weakref.ref[Tensor], Any, Tensor, _Kept] | None = None
        self._pass: _Pass | None = None
        self._count = 0

    @contextmanager
    def attached(self, strengths: Tensor | None = None) -> Iterator[KVProjector]:
        """Patch the model inside the block.

        Args:
            strengths: ``(N,)`` for every row, or ``(rows, N)`` for the rows of the batch; all 1 by default.
        """
        self.strengths = torch.ones(len(self.composition.deltas)) if strengths is None else strengths
        try:
            with patched(self.modules, self.wrap):
                yield self
        finally:
            self.clear()

    @contextmanager
    def forward_pass(
        self, strengths: Tensor, prompts: Tensor | None = None, default: Tensor | None = None, on_unknown: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """One forward pass of a host that leaves the patch in place; after it the patch does nothing until the next.

        Within a pass contexts are known by their address, so they must not be written to.

        Args:
            strengths: ``(N,)`` for every row, or ``(rows, N)`` for the rows of the batch.
            prompts: the batch ``(rows, tokens, d_in)``. Where a projection meets other rows, because another extension added some,
                each gets the strengths of the prompt with the same tokens.
            default: ``(N,)`` for rows that are no prompt of the batch; all 1 by default. on_unknown: called when there are such rows.
        """
        default = torch.ones(len(self.composition.deltas)) if default is None else default
        self.strengths, self._pass = strengths, _Pass(prompts, default, on_unknown)
        try:
            yield
        finally:
            self.strengths = self._pass = None

    def clear(self) -> None:
        """Forget all keys and values."""
        self._kept.clear()
        self._seen = None

    @property
    def kept_bytes(self) -> int:
        return sum(entry.bytes for entry in self._kept.values())

    def wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        """The projection's ``forward`` with the deltas added."""
        return lambda context: self.project(name, module, forward, context)

    def project(self, name: str, module: nn.Module, forward: Forward, context: Tensor) -> Tensor:
        """Keys or values ``(rows, tokens, d_out)`` of a context: ``forward``'s own, with the deltas added where there are strengths."""
        if self.strengths is None:
            return forward(context)
        if torch.is_grad_enabled() or not self.keep:
            touch = self.composition.touch(context, self._strengths(context), self.gate)
            return self._compute(name, forward, context, touch)
        entry = self._entry(context)
        weight = weight_of(module)
        state = (weight.data_ptr(), _version(weight), weight.dtype)
        hit = entry.outputs.get(name)
        if hit is None or hit[0]() is not weight or hit[1] != state:
            hit = entry.outputs[name] = (weakref.ref(weight), state, self._compute(name, forward, context, entry.touch))
            self._shrink(entry)
        return hit[2]

    def _compute(self, name: str, forward: Forward, context: Tensor, touch: Touch) -> Tensor:
        out = forward(context)
        if len(touch.rows) == 0:
            return out
        up = self.composition.up(name, touch.concepts).to(out.device)
        return add_to_rows(out, touch.h, up, touch.rows)

    def _strengths(self, context: Tensor) -> Tensor:
        assert self.strengths is not None
        return self.strengths if self._pass is None else self._pass.strengths(context, self.strengths)

    def _entry(self, context: Tensor) -> _Kept:
        """What is kept for this context: by identity within a forward pass, by content across passes."""
        if self._pass is None:
            return self._find_by_version(context)
        key = (context.data_ptr(), context.shape, context.stride(), context.dtype, context.device)
        hit = self._pass.seen.get(key)
        if hit is None:
            hit = context, self._find(context)
            if len(self._pass.seen) < SEEN:
                self._pass.seen[key] = hit
        return hit[1]

    def _find_by_version(self, context: Tensor) -> _Kept:
        """For hosts that do not say where a forward pass begins: the last context, as long as nobody has written to it."""
        assert self.strengths is not None
        versions = (_version(context), _version(self.strengths))
        if self._seen is not None:
            reference, seen_versions, strengths, entry = self._seen
            if reference() is context and strengths is self.strengths and None not in versions and seen_versions == versions:
                return entry
        entry = self._find(context)
        self._seen = (weakref.ref(context), versions, self.strengths, entry)
        return entry

    def _find(self, context: Tensor) -> _Kept:
        strengths = self._strengths(context)
        for key, entry in self._kept.items():
            same = entry.context.shape == context.shape and entry.context.dtype == context.dtype and entry.context.device == context.device
            if same and torch.equal(entry.strengths, strengths) and torch.equal(entry.context, context):
                self._kept.move_to_end(key)
                return entry
        entry = _Kept(context.detach().clone(), strengths.clone(), self.composition.touch(context, strengths, self.gate))
        self._count += 1
        self._kept[self._count] = entry
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
