"""Which image and which prompt a row of a UNet's batch belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def by_order(rows: int, cond_or_uncond: Sequence[int], positive: Tensor, negative: Tensor) -> Tensor | None:
    """Strengths ``(rows, N)`` where the host says what each chunk of the batch is (0: prompt, 1: negative prompt).

    A chunk holds the images in order, or (tiled upscalers) several times over. None where the numbers do not fit.
    """
    chunk, rest = divmod(rows, max(len(cond_or_uncond), 1))
    images = len(positive)
    if rest or not cond_or_uncond or chunk % images:
        return None
    index = torch.arange(chunk) % images
    return torch.cat([(negative if kind else positive)[index] for kind in cond_or_uncond])


@dataclass
class Expected:
    """The rows of one denoising step in the order in which Automatic1111 calls the UNet: prompts (with AND several an image), then
    negative prompts; in one call or in several.

    Attributes:
        contexts: ``(tokens, d_in)`` each, prompts of other lengths than negative prompts. strengths: ``(rows, N)``. at: the next row.
    """

    contexts: list[Tensor]
    strengths: Tensor
    at: int = 0

    @staticmethod
    def make(text_cond: Tensor, text_uncond: Tensor | None, parts: Sequence[int], positive: Tensor, negative: Tensor) -> Expected:
        """Args: parts: how many rows of ``text_cond`` each image has."""
        owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
        uncond = [] if text_uncond is None else list(text_uncond)
        return Expected([*text_cond, *uncond], torch.cat([positive[owner], negative[: len(uncond)]]))

    def take(self, context: Tensor) -> Tensor | None:
        """Strengths ``(rows, N)`` of the next call's rows; None where rows come that were not announced.

        Rows are compared by content, since extensions leave calls out or add their own. Hosts lengthen or shorten contexts
        to one length; the common beginning decides.
        """
        if bool((self.strengths == self.strengths[:1]).all()):
            return self.strengths[:1].expand(len(context), -1)
        starts = [self.at, *(i for i in range(len(self.contexts)) if i != self.at)]
        for start in starts:
            if self._matches(context, start):
                self.at = (start + len(context)) % len(self.contexts)
                return self.strengths[start : start + len(context)]
        rows = [next((i for i in range(len(self.contexts)) if self._matches(context[r : r + 1], i)), None) for r in range(len(context))]
        return None if None in rows else self.strengths[rows]

    def _matches(self, context: Tensor, start: int) -> bool:
        rows = self.contexts[start : start + len(context)]
        return len(rows) == len(context) and all(_begins_alike(a, b) for a, b in zip(context, rows, strict=True))


def _begins_alike(a: Tensor, b: Tensor) -> bool:
    tokens = min(len(a), len(b))
    return torch.equal(a[:tokens], b[:tokens].to(a))
