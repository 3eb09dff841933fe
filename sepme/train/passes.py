"""The passes of the model over one draw, as objectives see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.families import CONTEXT
from ..model.layers import projections
from ..model.patch import Forward, patched
from ..model.protocols import Denoiser, Encoding
from .increment import Increment
from .objectives import Step
from .run import ConceptRun
from .source import Draw


def make_step(run: ConceptRun, increments: Sequence[Increment], denoiser: Denoiser, draw: Draw) -> Step:
    """One draw of a concept; ``increments`` are those of all concepts that are trained together."""
    x_t, t, prompts = draw
    layers = denoiser.attention_layers()
    changed = {name: module for name, module in projections(layers).items() if any(name in i.names for i in increments)}

    def predict(c: Encoding) -> Tensor:
        return _precise(denoiser.predict(x_t, t, c.context, c.pooled))

    def frozen(c: Encoding) -> Tensor:
        with torch.no_grad():
            return predict(c)

    def erased(c: Encoding, heard: dict[str, Tensor] | None = None) -> Tensor:
        """ε with the increments; what goes out of queries and keys is put into ``heard``."""
        if c.pooled is not None and run.pooled is not None:
            c = c._replace(pooled=run.pooled.replace(c.pooled))
        features = [increment.features(c.context) for increment in increments]

        def add(name: str, out: Tensor) -> Tensor:
            for increment, h in zip(increments, features, strict=True):
                if name in increment.names:
                    out = out + increment.term(name, h).to(out.dtype)
            return out

        def wrap(name: str, module: nn.Module, forward: Forward) -> Forward:
            def project(x: Tensor) -> Tensor:
                out = add(name, forward(x))
                if heard is not None:
                    heard[name] = out
                return out

            return project

        listened = {f"{n}.{p}": getattr(layer, p) for n, layer in layers.items() for p in ("to_q", "to_k")} if heard is not None else {}
        with patched(listened | changed, wrap):
            return predict(c._replace(context=add(CONTEXT, c.context)))

    def attention(c: Encoding) -> list[Tensor]:
        heard: dict[str, Tensor] = {}
        erased(c, heard)
        return [_map(heard[f"{name}.to_q"], heard[f"{name}.to_k"], layer.heads) for name, layer in layers.items()]

    batch = len(prompts)
    own, words = run.own.rows(prompts), None if run.words is None else run.words[prompts]
    empty, anchor = (e.rows([0] * batch) for e in (run.empty, run.anchor))
    return Step(frozen, erased, attention, own, empty, anchor, words)


def _map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Attention ``(batch, heads, queries, tokens)`` of queries ``(batch, queries, d)`` and keys ``(batch, tokens, d)``."""
    q, k = (_precise(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def _precise(value: Tensor) -> Tensor:
    """At least float32; float64 where the model is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
