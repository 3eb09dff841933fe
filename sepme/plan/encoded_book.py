"""A concept book as the text encoder reads it: every prompt encoded once, and which prompts constrain which concept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..concepts import ConceptBook, mentions, normalised
from ..model.encoder_fingerprint import EncoderFingerprint
from ..model.protocols import Encoding, TextEncoder, free_length
from ..progress import OnProgress, silent
from .directions import reduce_rows
from .gate import affordable
from .nearby import Nearby, NearbyPrompts
from .preserved import Preserved
from .said import Said
from .tokens import Padding, aligned, encode, token_rows

GROUP_ROWS = 1 << 13  # token rows of several concepts worked on at once
LOUD = 8.0  # times the median norm of the tokens: the largest norm that counts in full
SAME_SINK = 0.01  # of the sinks' largest singular value: what they differ by


class EncodedBook:
    """Token matrices of a book.

    Args:
        encoder: the host's text encoder.
        book: every known concept (old and new) and what must be preserved.
        padding: whether tokens after a prompt's end count.
        ordinary: calibration corpus; the shipped one by default.
        nearby: how many words near the concepts are looked for.
        said, near: see :meth:`Nearby.of`.
        on_progress: called while prompts are read; it may raise :class:`~sepme.errors.Interrupted`.

    Attributes:
        names: the concepts, in the book's order.
        empty: the empty prompt.
        encodings, anchors: by concept.
        preserved: what must not change; its file is read a batch at a time.
        ordinary: prompts that gates are calibrated on, and prompts held out, which verification reads too.
        nearby: words near the concepts.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        book: ConceptBook,
        padding: Padding,
        ordinary: Sequence[str] | None = None,
        on_progress: OnProgress = silent,
        nearby: int = 0,
        said: Mapping[str, Said] | None = None,
        near: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.encoder, self.book, self.padding, self.on_progress = encoder, book, padding, on_progress
        self.names = [c.name for c in book.concepts]
        self.empty = encode(encoder, [""])
        anchors = {a: encode(encoder, [a]) for a in dict.fromkeys(c.anchor for c in book.concepts)}
        self.anchors = {c.name: anchors[c.anchor] for c in book.concepts}
        self.encodings: dict[str, Encoding] = {}
        for i, concept in enumerate(book.concepts):
            on_progress("Reading concepts", i, len(book.concepts))
            self.encodings[concept.name] = encode(encoder, concept.prompts)
        ordinary = affordable(self.empty.context) if ordinary is None else ordinary
        self.ordinary = tuple(ordinary[::2]), tuple(ordinary[1::2])
        self.preserved = Preserved(encoder, book, on_progress)
        self.nearby = NearbyPrompts(encoder, Nearby.of(encoder, book, nearby, on_progress, said, near), on_progress)

    def rows(self, name: str, which: list[bool] | None = None) -> Tensor:
        """Token rows ``(n, d_in)`` float64 of a concept's prompts, or of some of them."""
        encoding = self.encodings[name]
        if which is not None:
            encoding = Encoding(encoding.context[which], encoding.mask[which])
        return self.token_rows(encoding)

    def token_rows(self, encoding: Encoding) -> Tensor:
        """Token rows ``(n, d_in)`` float64, without what they share with sinks; other loud ones are toned down."""
        rows = token_rows(encoding, self.padding)
        if self.sinks is None:
            return rows
        rows = rows - (rows @ self.sinks) @ self.sinks.T
        return rows * self.volume(rows)

    def volume(self, rows: Tensor) -> Tensor:
        """What tones loud rows down ``(n, 1)``, 1 for all others."""
        return (self._loud / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)

    @cached_property
    def _loud(self) -> float:
        """The largest norm of a token that counts in full."""
        rows = (token_rows(e, self.padding) for e in (self.empty, *self.encodings.values()))
        return LOUD * float(torch.cat([r.norm(dim=-1) for r in rows]).median())

    @cached_property
    def sinks(self) -> Tensor | None:
        """Orthonormal columns ``(d_in, m)`` float64 along which the sinks lie, None where there are none.

        Language models have tokens of a norm a thousand times that of others, nearly the same in every prompt. Beside them nothing else
        would count, and whatever is edited along them moves them by more than all other tokens.
        """
        if not free_length(self.encoder):
            return None
        rows = torch.cat([token_rows(e, self.padding) for e in (self.empty, *self.encodings.values())])
        loud = rows[rows.norm(dim=-1) > self._loud]
        if len(loud) == 0:
            return None
        _, values, right = torch.linalg.svd(reduce_rows(loud), full_matrices=False)
        return right[values > SAME_SINK * values[0]].T

    def tokens(self, name: str) -> tuple[Tensor, Tensor]:
        """Tokens C ``(n, d_in)`` of a concept's prompts and its anchor's C*, aligned by position; float64."""
        own, anchor = self.encodings[name], self.anchors[name].context
        if free_length(self.encoder):
            anchor = aligned(own.context, anchor)
        else:
            anchor = anchor.repeat(1, own.context.shape[1] // anchor.shape[1], 1).expand_as(own.context)
        rows, target = token_rows(own, self.padding), token_rows(Encoding(anchor, own.mask), self.padding)
        volume = 1.0 if self.sinks is None else self.volume(rows)
        return rows * volume, target * volume

    @cached_property
    def fingerprint(self) -> EncoderFingerprint:
        """Of the text encoder, at the layer that it was read at."""
        return EncoderFingerprint.of(self.encoder)

    @property
    def row_count(self) -> int:
        """Token rows of all concepts' prompts."""
        return sum(len(self.rows(name)) for name in self.names)

    @cached_property
    def _texts(self) -> dict[str, str]:
        return {c.name: "\n".join(map(normalised, c.prompts)) for c in self.book.concepts}

    def carriers(self, name: str) -> dict[str, list[bool]]:
        """Other concepts with prompts that hold this one's words, and which of their prompts do not; the rest carry it and
        never constrain it (METHOD, section 3)."""
        words = normalised(name)
        found = {o: [not mentions(p, name) for p in self.book[o].prompts] for o, t in self._texts.items() if o != name and words in t}
        return {o: free for o, free in found.items() if not all(free)}

    def groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Consecutive concepts whose prompts have equally many tokens, a few thousand token rows together."""
        group: list[str] = []
        rows = 0
        for name in names:
            mask = self.encodings[name].mask
            if group and (rows + mask.numel() > GROUP_ROWS or mask.shape[1] != self.encodings[group[0]].mask.shape[1]):
                yield group
                group, rows = [], 0
            group.append(name)
            rows += mask.numel()
        if group:
            yield group
