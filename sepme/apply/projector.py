"""Patched projections: the host's own keys and values, a delta added in touched rows, cached across denoising steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import SepMEError
from ..model.blocks import TextBlocks
from ..model.layers import Layers, projections, shapes
from ..model.patch import Forward, patched
from .composition import Composition, Touch
from .forward_pass import Pass
from .kv_cache import LEAST, CachedBatch, KVCache, fingerprint
from .ops import PROJECT_KV, add_to_rows, add_to_rows_eager, project_kv, project_kv_eager, split, why_not

BACKENDS = ("auto", "exact", "fused", "eager")


def plain_weight(module: nn.Module, forward: Forward) -> Tensor | None:
    """The weight ``(d_out, d_in)`` of a projection that is nothing but ``c Wᵀ``; None if the host does anything else there."""
    plain = getattr(forward, "__func__", None) is nn.Linear.forward and getattr(forward, "__self__", None) is module
    return module.weight if plain and isinstance(module, nn.Linear) and module.bias is None else None


@dataclass(frozen=True)
class _Site:
    """A patched projection."""

    module: nn.Module
    forward: Forward
    weight: Callable[[], Tensor | None]


class KVProjector:
    """Applies a composition to a model's cross-attention.

    Backends (KV of untouched rows are the host's own, bit for bit, in ``exact`` and ``auto``):

    - ``exact``: the host's own projections at the host's own batch shape, the delta added in touched rows.
    - ``fused``: ``c Wᵀ + H Yᵀ`` of all layers in one operator, rounded once; rows differ from the host's by rounding. Where the host
      does anything but a plain product (casts, adapters, quantised or offloaded weights), or no row is touched: ``exact``.
    - ``auto``: ``fused`` where every row is touched and a kernel is there for it, else ``exact``.
    - ``eager``: ``fused`` by the operators' plain PyTorch bodies, whatever kernels there are; the reference.

    Args:
        layers: cross-attention modules by canonical name, or a model's :class:`TextBlocks`. Where those read what the model makes of the
            context, a pass must be given the prompts' contexts.
        composition: the deltas.
        gate: False applies purely linear deltas.
        keep: keep keys and values across steps (same prompt, strengths and weights); the environment's SEPME_KEEP=0 switches it off in
            every host.
        max_bytes: cap on the cache; :func:`~.kv_cache.room` of the model.

    Raises:
        SepMEError: deltas of another model, an unknown backend.
    """

    def __init__(
        self,
        layers: Layers,
        composition: Composition,
        gate: bool = True,
        keep: bool = True,
        max_bytes: int = LEAST,
        backend: str = "auto",
    ) -> None:
        if backend not in BACKENDS:
            raise SepMEError(f"There is no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
        self.modules = projections(layers)
        self.composition, self.gate, self.backend = composition, gate, backend
        self.keep = keep and os.environ.get("SEPME_KEEP") != "0"
        for delta in composition.deltas:
            delta.check_fits(shapes(layers))
        self.embedded = isinstance(layers, TextBlocks) and not layers.direct
        self._columns = _columns(layers, composition)
        self.cache = KVCache(max_bytes)
        self._pass: Pass | None = None
        self._sites: dict[str, _Site] = {}
        self._held: tuple[Any, Tensor] | None = None

    @contextmanager
    def attached(self, strengths: Tensor | None = None, unedited: Tensor | None = None) -> Iterator[KVProjector]:
        """Patch the model inside the block, however often it is called there.

        Args:
            strengths: ``(N,)`` for every row, or ``(rows, N)`` for the rows of every batch; all 1 by default.
            unedited: every batch before its context was edited (:meth:`Composition.edit_context`) or embedded by the model, if it was.

        Raises:
            SepMEError: the layers read an embedding and the contexts are not given.
        """
        if self.embedded and unedited is None:
            raise SepMEError("This model's layers read an embedding of the prompts; give the prompts' contexts too (unedited).")
        strengths = torch.ones(len(self.composition.deltas)) if strengths is None else strengths
        try:
            with patched(self.modules, self.wrap), self.forward_pass(strengths, unedited=unedited):
                yield self
        finally:
            self.clear()

    @contextmanager
    def forward_pass(
        self,
        strengths: Tensor,
        prompts: Tensor | None = None,
        default: Tensor | None = None,
        on_unknown: Callable[[], None] = lambda: None,
        state: Hashable = None,
        unedited: Tensor | None = None,
    ) -> Iterator[Pass]:
        """One forward pass. Outside of it the patch does nothing, so hosts may leave it in place.

        Args:
            strengths: ``(N,)`` for every row, or ``(rows, N)`` for the rows of the batch.
            prompts: the batch ``(rows, tokens, d_in)``. Where a projection meets other rows, because another extension added some,
                each gets the strengths of the prompt with the same tokens.
            default: ``(N,)`` for rows that are no prompt of the batch; all 1 by default.
            on_unknown: called when there are such rows.
            state: anything that keys and values depend on and that does not show in parameters and their version counters (a host's
                own count of weight patches); under another state everything is computed again.
            unedited: the batch before its context was edited, if it was.
        """
        default = torch.ones(len(self.composition.deltas)) if default is None else default
        outer, self._pass = self._pass, Pass(strengths, prompts, default, on_unknown, state, unedited, self.embedded)
        try:
            yield self._pass
        finally:
            self._pass = outer

    def clear(self) -> None:
        """Forget all keys and values."""
        self.cache.clear()
        self._held = None

    @property
    def cached_bytes(self) -> int:
        """Bytes in the cache: contexts, H, keys and values."""
        return self.cache.bytes

    def wrap(self, name: str, module: nn.Module, forward: Forward, weight: Callable[[], Tensor | None] | None = None) -> Forward:
        """The projection's ``forward`` with the deltas added. Hosts that leave it in place call :meth:`clear` after a run.

        Args:
            name: canonical projection name.
            forward: what the host would call.
            weight: gives W where ``forward`` is nothing but ``c Wᵀ`` at the moment, else None; by default :func:`plain_weight`.
        """
        self._sites[name] = _Site(module, forward, weight or partial(plain_weight, module, forward))
        return lambda context: self.project(name, module, forward, context)

    def project(self, name: str, module: nn.Module, forward: Forward, context: Tensor) -> Tensor:
        """Keys or values ``(rows, tokens, d_out)`` of a context: ``forward``'s own, with the deltas added while a pass lasts."""
        current = self._pass
        if current is None:
            return forward(context)
        site = self._sites.get(name)
        if site is None or site.module is not module or site.forward != forward:
            self._sites[name] = _Site(module, forward, partial(plain_weight, module, forward))
        if torch.is_grad_enabled():
            return self._exact(name, context, self._touch(current, context, current.rows(context)))
        batch = self._batch(current, name, context)
        output = batch.get(name, fingerprint(module))
        if output is not None:
            return output
        outputs = self._compute(name, context, batch)
        if self.keep:
            # offloading hosts replace parameters around a forward; what they leave is what the next step finds
            outputs = {made: batch.put(made, fingerprint(self._sites[made].module), out) for made, out in outputs.items()}
            self.cache.put(batch)
            if len(batch.outputs) == len(self._sites):
                self._held = None
        return outputs[name]

    def why_not_fused(self, context: Tensor) -> str | None:
        """Why ``fused`` is something else on this model at the moment, in words; None where a kernel runs."""
        if self.embedded:
            return "this model's layers read an embedding of the prompts; exact is used instead"
        weights = [site.weight() for site in self._sites.values()]
        plain = [w for w in weights if w is not None]
        if len(plain) < len(weights):
            return "this model's weights are cast, patched or offloaded while it runs; exact is used instead"
        if torch.is_autocast_enabled(context.device.type):
            return "the model runs under autocast; exact is used instead"
        reason = why_not(PROJECT_KV, context=context.to(plain[0].dtype), weights=plain)
        return reason and f"{reason}; plain PyTorch does the same here"

    def _batch(self, current: Pass, name: str, context: Tensor) -> CachedBatch:
        """The batch of a context: by its address within a pass, by its content across passes, or a new one."""
        autocast = torch.get_autocast_dtype(context.device.type) if torch.is_autocast_enabled(context.device.type) else None
        batch = current.recall(name, context, autocast)
        if batch is None:
            rows, key = current.rows(context), (current.state, autocast)
            batch = self.cache.get(context, rows, key)
            if batch is None:
                batch = CachedBatch(context, rows, key, self._touch(current, context, rows))
            self.cache.put(batch)
            current.remember(context, autocast, batch)
        return batch

    def _touch(self, current: Pass, context: Tensor, rows: Tensor) -> Touch:
        """What the deltas meet of a context, or of the prompts that it was made of."""
        source = current.source(context)
        touch = self.composition.touch(source, rows, self.gate)
        if not self.embedded or len(touch.rows) == 0:
            return touch
        laid = _laid(touch, source, context)
        if laid is None:
            current.on_unknown()
            return Touch(touch.rows[:0], touch.h[:0], ())
        return laid

    def _compute(self, name: str, context: Tensor, batch: CachedBatch) -> dict[str, Tensor]:
        """The output that is asked for, and all others that are missing where one operator makes them together."""
        fusible = self.backend != "exact" and len(batch.touch.rows) > 0 and not self.embedded
        weights = self._fusible(name, context, batch) if fusible else {}
        return self._fused(weights, context, batch.touch) if weights else {name: self._exact(name, context, batch.touch)}

    def _fusible(self, name: str, context: Tensor, batch: CachedBatch) -> dict[str, Tensor]:
        """Weights of the projection that is asked for, and of the missing ones, if one operator is to make them; else nothing."""
        if torch.is_autocast_enabled(context.device.type) or (self.backend == "auto" and len(batch.touch.rows) < len(context)):
            return {}
        missing = [n for n in self._sites if n == name or n not in batch.outputs] if self.keep else [name]
        found = {n: self._sites[n].weight() for n in missing}
        weights = {n: w for n, w in found.items() if w is not None and _same_kind(w, context)}
        if name not in weights or (self.backend == "auto" and why_not(PROJECT_KV, context=context, weights=list(weights.values()))):
            return {}
        return weights

    def _exact(self, name: str, context: Tensor, touch: Touch) -> Tensor:
        site = self._sites[name]
        base = site.forward(context)
        if len(touch.rows) == 0:
            return base
        up = self._factors(touch, base.device)[:, self._columns[name]]
        fresh = not torch.is_grad_enabled() and site.weight() is not None
        by_row = base.reshape(-1, touch.h.shape[1], base.shape[-1]) if self.embedded else base
        added = (add_to_rows_eager if self.backend == "eager" else add_to_rows)(by_row, touch.h, up, touch.rows, fresh)
        return added.reshape(base.shape) if self.embedded else added

    def _factors(self, touch: Touch, device: torch.device) -> Tensor:
        """Y of the concepts that touch a batch, held until all its projections are there (without a cache: for one projection)."""
        key = (touch.concepts, device)
        if self._held is None or self._held[0] != key:
            self._held = key, self.composition.factors(touch.concepts, device)
        return self._held[1]

    def _fused(self, weights: Mapping[str, Tensor], context: Tensor, touch: Touch) -> dict[str, Tensor]:
        up = self._factors(touch, context.device)
        if list(weights) != list(self._columns):
            up = torch.cat([up[:, self._columns[name]] for name in weights], dim=1)
        # a small β would sink into half precision's subnormals: powers of two go from Y to H, exactly
        exponent = torch.frexp(up.abs().amax(dim=1)).exponent
        up = torch.ldexp(up, -exponent[:, None]).to(context.dtype)
        h = torch.zeros(*context.shape[:2], up.shape[0], device=context.device)
        h[touch.rows] = torch.ldexp(touch.h, exponent)
        matrices = list(weights.values())
        flat = (project_kv_eager if self.backend == "eager" else project_kv)(context, matrices, up, h)
        return dict(zip(weights, split(flat, matrices, *context.shape[:2]), strict=True))


def _columns(layers: Layers, composition: Composition) -> dict[str, slice]:
    """Where each module's outputs stand in :meth:`Composition.factors`; keys and values of one module stand side by side there too."""
    if not isinstance(layers, TextBlocks):
        return composition.columns
    sites = {path: [composition.columns[s] for s in sites] for path, sites in layers.sites.items()} if composition.columns else {}
    return {path: slice(s[0].start, s[-1].stop) for path, s in sorted(sites.items(), key=lambda item: item[1][0].start)}


def _laid(touch: Touch, prompts: Tensor, embedded: Tensor) -> Touch | None:
    """What deltas meet of prompts, as the tokens lie in what a model has made of them; None where that cannot be told.

    Args:
        prompts: ``(rows, tokens, d_in)``.
        embedded: ``(rows, tokens, ...)``, other texts' tokens behind the prompts' own, or all rows one after the other in a single one.
    """
    tokens, rest = divmod(embedded.shape[0] * embedded.shape[1], len(prompts))
    if rest or tokens < prompts.shape[1] or len(embedded) not in (1, len(prompts)):
        return None
    return replace(touch, h=pad(touch.h, (0, 0, 0, tokens - prompts.shape[1])))


def _same_kind(weight: Tensor, context: Tensor) -> bool:
    return weight.dtype == context.dtype and weight.device == context.device and weight.shape[1] == context.shape[-1]
