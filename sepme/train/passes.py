"""The passes of the model over one draw, as objectives see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import SepMEError
from ..model.families import CONTEXT
from ..model.layers import TextBlocks, projections
from ..model.lengths import whole
from ..model.patch import Forward, patched
from ..model.protocols import Denoiser, Encoding
from ..model.schedule import ScheduledDenoiser
from .increment import Increment
from .objectives import Step
from .run import ConceptRun
from .source import Draw


def make_step(run: ConceptRun, increments: Sequence[Increment], denoiser: Denoiser, draw: Draw) -> Step:
    """One draw of a concept; ``increments`` are those of all concepts that are trained together."""
    x_t, t, prompts = draw
    layers = denoiser.attention_layers()
    sites = layers.sites if isinstance(layers, TextBlocks) else {name: (name,) for name in projections(layers)}
    changed = {path: module for path, module in projections(layers).items() if any(s in i.names for s in sites[path] for i in increments)}

    rows = {site: shape[0] for site, shape in layers.shapes.items()} if isinstance(layers, TextBlocks) else {}

    def predict(c: Encoding, x_t: Tensor = x_t, t: Tensor = t) -> Tensor:
        return _precise(denoiser.predict(x_t, t, c.context, c.pooled))

    def frozen(c: Encoding) -> Tensor:
        with torch.no_grad():
            return predict(c)

    def erased(c: Encoding, heard: dict[str, Tensor] | None = None) -> Tensor:
        """ε with the increments; what goes out of queries and keys is put into ``heard``."""
        if c.pooled is not None and run.pooled is not None:
            c = c._replace(pooled=run.pooled.replace(c.pooled))
        if not isinstance(layers, TextBlocks) or not isinstance(denoiser, ScheduledDenoiser):
            return together(c, x_t, t, heard)
        parts = denoiser.parts(c.context, t)
        each = (c._replace(context=c.context[:, : p.tokens], mask=c.mask[:, : p.tokens]).rows(p.rows) for p in parts)
        return whole(parts, [together(one, x_t[p.rows], t[p.rows]) for one, p in zip(each, parts, strict=True)])

    def together(c: Encoding, x_t: Tensor, t: Tensor, heard: dict[str, Tensor] | None = None) -> Tensor:
        """The same of rows that the model reads at once."""
        features = [increment.features(c.context) for increment in increments]

        def add(names: Sequence[str], out: Tensor) -> Tensor:
            for increment, h in zip(increments, features, strict=True):
                if any(name in increment.names for name in names):
                    terms = [increment.term(n, h) if n in increment.names else h.new_zeros(*h.shape[:2], rows[n]) for n in names]
                    out = out + _laid(torch.cat(terms, dim=-1), out).to(out.dtype)
            return out

        def wrap(name: str, module: nn.Module, forward: Forward) -> Forward:
            def project(x: Tensor) -> Tensor:
                out = add(sites.get(name, (name,)), forward(x))
                if heard is not None:
                    heard[name] = out
                return out

            return project

        modules = dict(changed)
        if heard is not None and not isinstance(layers, TextBlocks):
            modules = {f"{n}.{p}": getattr(layer, p) for n, layer in layers.items() for p in ("to_q", "to_k")} | modules
        with patched(modules, wrap):
            return predict(c._replace(context=add([CONTEXT], c.context)), x_t, t)

    def attention(c: Encoding) -> list[Tensor]:
        assert not isinstance(layers, TextBlocks)
        heard: dict[str, Tensor] = {}
        erased(c, heard)
        return [_map(heard[f"{name}.to_q"], heard[f"{name}.to_k"], layer.heads) for name, layer in layers.items()]

    batch = len(prompts)
    own, words = run.own.rows(prompts), None if run.words is None else run.words[prompts]
    empty, anchor = (e.rows([0] * batch) for e in (run.empty, run.anchor))
    return Step(frozen, erased, attention, own, empty, anchor, words)


def _laid(term: Tensor, out: Tensor) -> Tensor:
    """What is added for prompts ``(rows, tokens, d_out)`` as their tokens lie in a layer's output: other texts' tokens behind them, or all
    rows one after the other in a single one.

    Raises:
        SepMEError: they lie in another way.
    """
    if term.shape == out.shape:
        return term
    tokens, rest = divmod(out.shape[0] * out.shape[1], len(term))
    if rest or tokens < term.shape[1] or len(out) not in (1, len(term)):
        raise SepMEError("This model leaves out tokens of the prompts before its layers read them; edit the context instead of layers.")
    return pad(term, (0, 0, 0, tokens - term.shape[1])).reshape(out.shape)


def _map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Attention ``(batch, heads, queries, tokens)`` of queries ``(batch, queries, d)`` and keys ``(batch, tokens, d)``."""
    q, k = (_precise(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def _precise(value: Tensor) -> Tensor:
    """At least float32; float64 where the model is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
