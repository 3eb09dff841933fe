"""Prompts -> token matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..errors import SepMEError
from ..model.protocols import Encoding, TextEncoder, free_length

Padding = Literal["all", "none"]
CHUNK = 256  # prompts encoded at once
STEP = 16  # lengths that prompts of any length are filled up to, so that many can be worked on at once


def encode(encoder: TextEncoder, prompts: Sequence[str]) -> Encoding:
    """Encode many prompts on the CPU, a few hundred at a time, all rows of one length.

    Rows of fewer 77-token chunks are repeated to the longest's length; where prompts have any number of tokens, zeros stand for those
    that they lack. Zeros take no part in anything: no direction carries them and no gate opens for them.

    Raises:
        SepMEError: the encoder returned NaN or infinite values.
    """
    parts = [encoder.encode(list(prompts[i : i + CHUNK])).to("cpu") for i in range(0, len(prompts), CHUNK)]
    longest = max(p.context.shape[1] for p in parts)
    contexts, masks = [], []
    for part in parts:
        length = part.context.shape[1]
        if free_length(encoder):
            missing = -(-longest // STEP) * STEP - length
            contexts.append(pad(part.context.detach(), (0, 0, 0, missing)))
            masks.append(pad(part.mask, (0, missing)))
            continue
        repeat = longest // length
        if length * repeat != longest:
            raise SepMEError("The text encoder returned rows of incompatible lengths; prompts must fill whole chunks of tokens.")
        contexts.append(part.context.detach().repeat(1, repeat, 1))
        masks.append(part.mask.repeat(1, repeat))
    context = torch.cat(contexts)
    pooled = [p.pooled.detach() for p in parts if p.pooled is not None]
    if not all(v.isfinite().all() for v in (context, *pooled)):
        raise SepMEError("The text encoder returned NaN or infinite values; check the checkpoint, or run the encoder in float32.")
    return Encoding(context, torch.cat(masks), torch.cat(pooled) if pooled else None)


def means(encoding: Encoding) -> Tensor:
    """Mean direction of each prompt's tokens, without padding ``(prompts, d_in)`` float32."""
    unit = normalize(encoding.context.float(), dim=-1)
    return (unit * encoding.mask[..., None]).sum(1) / encoding.mask.sum(1, keepdim=True)


def present(context: Tensor) -> Tensor:
    """Which tokens ``(prompts, tokens)`` bool of a context ``(prompts, tokens, d_in)`` there are: those that are not zero."""
    return context.ne(0).any(dim=-1)


def token_rows(encoding: Encoding, padding: Padding) -> Tensor:
    """Token rows ``(n, d_in)`` float64."""
    chosen = present(encoding.context)
    return encoding.context[chosen if padding == "all" else chosen & encoding.mask].double()


def aligned(own: Tensor, anchor: Tensor) -> Tensor:
    """The anchor's tokens ``(prompts, tokens, d_in)`` in the places of those of prompts ``(prompts, tokens, d_in)`` of any length.

    They stand in their order from the left, the last one in all further places: of the ways that were measured
    (docs/text-encoders.md) this leaves least of a concept.

    Args:
        anchor: ``(1, tokens, d_in)``.
    """
    given = anchor[0][present(anchor)[0]].to(own.dtype)
    result = torch.zeros_like(own)
    for row, there in zip(result, present(own), strict=True):
        row[there] = given[torch.arange(int(there.sum())).clamp_max(len(given) - 1)]
    return result
