"""What a model's cross-attention asks the text while it looks at a concept's pictures, and what a text answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.layers import weight_of
from ..model.protocols import AttentionLayer, Denoiser, Encoding
from .source import Draw

WIDTH = 40_000  # numbers that all queries of all layers may answer with
DRAWS = 6  # batches of pictures that queries are taken from
SEEN = 4000  # of a layer's queries that are clustered
CLUSTERING = 15  # rounds of k-means


class ImageQueries(NamedTuple):
    """Stored image queries of a layer ``(queries, heads, d)``, ready to be asked, and its value weights ``(heads, d, d_in)``."""

    asked: Tensor  # (queries, heads, d_in): W_kᵀ q / √d
    values: Tensor

    def answers(self, context: Tensor) -> Tensor:
        """What the layer answers them ``(rows, queries, heads, d)`` on a context ``(rows, tokens, d_in)``."""
        attention = torch.einsum("nti,qhi->nqht", context, self.asked).softmax(dim=-1)
        return torch.einsum("nqhi,hdi->nqhd", torch.einsum("nqht,nti->nqhi", attention, context), self.values)


def image_queries(
    host: Denoiser,
    by_name: Mapping[str, AttentionLayer],
    own: Encoding,
    draw: Callable[[], Draw],
    count: int,
    generator: torch.Generator,
    check: Callable[[], None],
) -> list[ImageQueries]:
    """Of every layer the centres of clusters of its queries while the model looks at pictures.

    Args:
        own: the prompts ``(prompts, tokens, d_in)`` that the pictures are of.
        draw: gives the next batch of pictures.
        count: of queries per layer, fewer where layers are many and wide.
        generator: of what is clustered.
        check: called before every batch; it may raise :class:`~sepme.errors.Interrupted`.
    """
    layers = list(by_name.values())
    taken: list[list[Tensor]] = [[] for _ in layers]
    handles = [layer.to_q.register_forward_hook(_taker(into)) for layer, into in zip(layers, taken, strict=True)]
    try:
        with torch.no_grad():
            for _ in range(DRAWS):
                check()
                x_t, t, which = draw()
                host.predict(x_t, t, *conditioning(own.rows(which)))
    finally:
        for handle in handles:
            handle.remove()
    count = max(2, min(count, WIDTH // sum(weight_of(layer.to_q).shape[0] for layer in layers)))
    return [_asked(layer, torch.cat(seen), count, generator) for layer, seen in zip(layers, taken, strict=True)]


def conditioning(encoding: Encoding) -> tuple[Tensor, ...]:
    """What a denoiser is given of prompts: their context, and their pooled vectors where it reads any."""
    return (encoding.context,) if encoding.pooled is None else (encoding.context, encoding.pooled)


def _asked(layer: AttentionLayer, seen: Tensor, count: int, generator: torch.Generator) -> ImageQueries:
    """The centres of ``count`` clusters of queries ``(n, heads d)``."""
    some = seen[torch.randperm(len(seen), generator=generator)[:SEEN]]
    centres = some[:count].clone()
    for _ in range(CLUSTERING):
        nearest = torch.cdist(some, centres).argmin(dim=1)
        for i in range(len(centres)):
            if (nearest == i).any():
                centres[i] = some[nearest == i].mean(dim=0)
    heads = layer.heads
    key, value = (weight_of(m).detach().float().cpu().unflatten(0, (heads, -1)) for m in (layer.to_k, layer.to_v))
    queries = centres.unflatten(1, (heads, -1)) / key.shape[1] ** 0.5
    return ImageQueries(torch.einsum("qhd,hdi->qhi", queries, key), value)


def _taker(into: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda module, args, out: into.append(out.detach().float().flatten(0, -2).cpu())
