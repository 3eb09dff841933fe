"""Prompts -> token matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import SepMEError
from ..model.protocols import Encoding, TextEncoder

Padding = Literal["all", "none"]
CHUNK = 256  # prompts encoded at once


def encode(encoder: TextEncoder, prompts: Sequence[str]) -> Encoding:
    """Encode many prompts on the CPU, a few hundred at a time; rows of fewer 77-token chunks are repeated to the longest's length.

    Raises:
        SepMEError: the encoder returned NaN or infinite values.
    """
    parts = [encoder.encode(list(prompts[i : i + CHUNK])).to("cpu") for i in range(0, len(prompts), CHUNK)]
    longest = max(p.context.shape[1] for p in parts)
    contexts, masks = [], []
    for part in parts:
        repeat = longest // part.context.shape[1]
        if part.context.shape[1] * repeat != longest:
            raise SepMEError("The text encoder returned rows of incompatible lengths; prompts must fill whole chunks of tokens.")
        contexts.append(part.context.detach().repeat(1, repeat, 1))
        masks.append(part.mask.repeat(1, repeat))
    context = torch.cat(contexts)
    pooled = [p.pooled.detach() for p in parts if p.pooled is not None]
    if not all(v.isfinite().all() for v in (context, *pooled)):
        raise SepMEError("The text encoder returned NaN or infinite values; check the checkpoint, or run the encoder in float32.")
    return Encoding(context, torch.cat(masks), torch.cat(pooled) if pooled else None)


def token_rows(encoding: Encoding, padding: Padding) -> Tensor:
    """Token rows ``(n, d_in)`` float64."""
    context = encoding.context.double()
    return context.reshape(-1, context.shape[-1]) if padding == "all" else context[encoding.mask]
