"""Which row of a context has which strengths: one answer for every host, from what the host knows of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Match(NamedTuple):
    """Strengths of the rows of a context.

    Attributes:
        strengths: ``(N,)`` for every row, or ``(rows, N)``.
        known: False where a row is none of the host's; it got the default.
        next: the known row behind those that were found, where the next call of the same step is likely to begin.
    """

    strengths: Tensor
    known: bool
    next: int


def row_strengths(
    context: Tensor,
    strengths: Tensor,
    default: Tensor,
    prompts: Sequence[Tensor] | Tensor | None = None,
    order: Sequence[int] | None = None,
    start: int = 0,
) -> Match:
    """Find the rows of a context among the rows that a host knows.

    What the host says of their order decides; else content, since extensions add, split and repeat rows. Prompts of the same tokens
    may differ in strengths, so a run of known rows is preferred to the same rows one by one.

    Args:
        context: ``(rows, tokens, d_in)``.
        strengths: ``(known, N)`` of the known rows, or ``(N,)`` of every row there may be.
        default: ``(N,)`` of rows that are none of the known ones.
        prompts: contexts ``(tokens, d_in)`` of the known rows; their lengths may differ.
        order: which known row each row of the context is. None: as they come, where there are as many. Empty: the host cannot say.
        start: the known row at which the context is likely to begin.
    """
    if strengths.dim() == 1 or (order is None and len(strengths) == len(context)):
        return Match(strengths, True, start)
    if order and len(order) == len(context):
        return Match(strengths[list(order)], True, start)
    if bool((strengths == default).all()):
        return Match(default, True, start)
    if prompts is None:
        alike = bool((strengths == strengths[0]).all())
        return Match(strengths[0] if alike else default, alike, start)
    same, rows, known = _same(context, prompts), len(context), len(prompts)
    for first in (start, *range(known)):
        if first + rows <= known and all(same[i][first + i] for i in range(rows)):
            return Match(strengths[first : first + rows], True, (first + rows) % known)
    found = [next((i for i, equal in enumerate(row) if equal), -1) for row in same]
    return Match(torch.cat([strengths, default[None]])[found], -1 not in found, start)


def chunked(rows: int, kinds: Sequence[int], images: int) -> list[int]:
    """The order of rows that a host lays out in chunks, where it knows a prompt and then a negative prompt of every image.

    A chunk holds the images in order, or (tiled upscalers) several times over.

    Args:
        rows: of the context.
        kinds: of each chunk, 0 for prompts and 1 for negative prompts.

    Returns:
        an index into ``2 * images`` known rows for every row; empty where the numbers do not fit.
    """
    size, rest = divmod(rows, max(len(kinds), 1))
    if rest or size % images:
        return []
    return [bool(kind) * images + i % images for kind in kinds for i in range(size)]


def _same(context: Tensor, prompts: Sequence[Tensor] | Tensor) -> Any:
    """For each row, whether it begins like each prompt: hosts lengthen and shorten contexts to one length. One wait for the GPU."""
    columns = []
    for prompt in prompts:
        tokens = min(context.shape[1], len(prompt))
        columns.append((context[:, :tokens] == prompt[:tokens].to(context)).flatten(1).all(dim=1))
    return torch.stack(columns, dim=1).tolist()
