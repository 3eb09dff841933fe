"""Prompts of different lengths in one batch: models that read a prompt at its own length must not be given what fills it up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Rows ``(n,)`` int64 of a batch that a model can read at once, and the tokens of their prompts."""

    rows: Tensor
    tokens: int


def parts(context: Tensor, least: int, t: Tensor | None = None) -> list[Part]:
    """A batch by the length of its prompts, which ends where nothing but zeros follows.

    Args:
        context: ``(batch, tokens, d_in)``, with zeros for what a prompt lacks beside longer ones.
        least: tokens that every prompt has, those of the empty one: the encoder itself fills up to them, with zeros or not.
        t: ``(batch,)`` int64 for models that take one timestep at a time.
    """
    batch, tokens = context.shape[:2]
    if tokens <= least and t is None:
        return [Part(torch.arange(batch), tokens)]
    lengths = [tokens] * batch
    if tokens > least:
        there = context.detach().ne(0).any(dim=-1).cpu()
        lengths = (there * torch.arange(1, tokens + 1)).amax(dim=1).clamp_min(least).tolist()
    keys = list(zip(lengths, [0] * batch if t is None else t.tolist(), strict=True))
    return [Part(torch.tensor([i for i, k in enumerate(keys) if k == key]), key[0]) for key in dict.fromkeys(keys)]


def whole(parts: list[Part], made: list[Tensor]) -> Tensor:
    """What was made of the parts ``(rows, ...)`` each, in the order of the batch."""
    return made[0] if len(made) == 1 else torch.cat(made)[torch.cat([p.rows for p in parts]).argsort().to(made[0].device)]
