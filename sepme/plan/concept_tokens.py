"""Where a concept's own words stand among the tokens of its prompts."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..concepts import Concept
from ..model.protocols import TextEncoder


def own_words(encoder: TextEncoder, concept: Concept, mask: Tensor) -> Tensor:
    """Tokens of the concept's name ``(prompts, tokens)`` bool in each of its prompts; of a prompt without it, all that is no padding.

    Found by the lengths of what goes before: the text before the name, and the same with the name, end at its first and last token.
    Start and end tokens are never among them.

    Args:
        mask: of the prompts ``(prompts, tokens)``, True up to and including the end token.
    """
    ends = mask.sum(1) - 1
    at = torch.arange(mask.shape[1], device=mask.device)
    result = (at > 0) & (at < ends[:, None])
    for i, prompt in enumerate(concept.prompts):
        found = re.search(rf"(?<!\w){re.escape(concept.name)}(?!\w)", prompt, re.IGNORECASE)
        if found is None:
            continue
        before, through = (encoder.encode([prompt[:end]]).mask.sum() - 1 for end in found.span())
        inside = (at >= int(before)) & (at < int(through))
        if bool((inside & result[i]).any()):
            result[i] &= inside
    return result
