"""The passes of the model over one draw, as objectives see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.patch import Forward, patched
from ..model.protocols import Denoiser, Encoding
from .increment import Increment
from .objectives import Step
from .source import Draw

if TYPE_CHECKING:
    from .loop import Track


def make_step(track: Track, increments: Sequence[Increment], denoiser: Denoiser, modules: Mapping[str, nn.Module], draw: Draw) -> Step:
    """One draw of a concept.

    Args:
        increments: of all concepts that are trained together. modules: the projections that they change, by name.
    """
    x_t, t, prompts = draw
    layers = denoiser.attention_layers()

    def predict(c: Encoding) -> Tensor:
        return _precise(denoiser.predict(x_t, t, c.context, c.pooled))

    def changed(c: Encoding, by: Sequence[Increment], heard: dict[str, Tensor] | None = None) -> Tensor:
        if c.pooled is not None and track.pooled is not None:
            c = c._replace(pooled=track.pooled.replace(c.pooled))
        features = [increment.features(c.context) for increment in by]

        def wrap(name: str, module: nn.Module, forward: Forward) -> Forward:
            def project(context: Tensor) -> Tensor:
                out = forward(context)
                for increment, h in zip(by, features, strict=True):
                    out = out + increment.term(name, h).to(out.dtype)
                if heard is not None:
                    heard[name] = out
                return out

            return project

        with patched(modules, wrap):
            return predict(c)

    def frozen(c: Encoding) -> Tensor:
        with torch.no_grad():
            return predict(c)

    def attention(c: Encoding) -> list[Tensor]:
        heard: dict[str, Tensor] = {}

        def listen(name: str, module: nn.Module, forward: Forward) -> Forward:
            def project(x: Tensor) -> Tensor:
                heard[name] = forward(x)
                return heard[name]

            return project

        with patched({f"{name}.to_q": layer.to_q for name, layer in layers.items()}, listen):
            changed(c, increments, heard)
        return [_map(heard[f"{name}.to_q"], heard[f"{name}.to_k"], layer.heads) for name, layer in layers.items()]

    batch = len(prompts)
    own, words = track.own.rows(prompts), None if track.words is None else track.words[prompts]
    empty, anchor = (e.rows([0] * batch) for e in (track.nothing, track.anchor))
    return Step(frozen, lambda c: changed(c, increments), attention, own, empty, anchor, words)


def _map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Attention ``(batch, heads, queries, tokens)`` of queries ``(batch, queries, d)`` and keys ``(batch, tokens, d)``."""
    q, k = (_precise(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def _precise(value: Tensor) -> Tensor:
    """At least float32; float64 where the model is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
