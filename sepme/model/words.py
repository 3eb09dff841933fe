"""The whole words of a text encoder's tokenizer, and which of them are near each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

END_OF_WORD = "</w>"  # of CLIP's byte pairs


class WordTable(NamedTuple):
    """Words that an encoder reads as one token, in the order of its vocabulary (frequent ones first).

    Attributes:
        rows: their token embeddings ``(words, d)``, of length 1, the common part taken out.
        place: of a text's tokens in the same space ``(d,)``.
    """

    words: tuple[str, ...]
    rows: Tensor
    place: Callable[[str], Tensor]

    def nearest(self, text: str) -> list[str]:
        """All words, those nearest to a text first."""
        order = (self.rows @ self.place(text)).argsort(descending=True, stable=True)
        return [self.words[i] for i in order.tolist()]


def clip_words(tokenizer: Any, embedding: Tensor) -> WordTable:
    """The words of CLIP's tokenizer (of the transformers library) and the encoder's token embeddings ``(tokens, d)``."""
    whole = re.compile(f"[a-z]{{3,}}{END_OF_WORD}")
    found = sorted((i, token.removesuffix(END_OF_WORD)) for token, i in tokenizer.get_vocab().items() if whole.fullmatch(token))
    table = embedding.detach().to("cpu", torch.float32)
    rows = table[[i for i, _ in found]]
    mean = rows.mean(0) if found else torch.zeros(table.shape[1])

    def place(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return normalize(table[ids].mean(0) - mean, dim=0) if ids else torch.zeros_like(mean)

    return WordTable(tuple(w for _, w in found), normalize(rows - mean, dim=-1), place)


def word_table(encoder: object) -> WordTable | None:
    """By ``encoder.words()`` of hosts that can tell; else None."""
    words = getattr(encoder, "words", None)
    return words() if callable(words) else None
