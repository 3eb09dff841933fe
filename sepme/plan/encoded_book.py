"""A concept book as the text encoder reads it: every prompt encoded once, and which prompts constrain which concept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from torch import Tensor

from ..concepts import ConceptBook, mentions, normalised
from ..model.encoder_fingerprint import EncoderFingerprint
from ..model.protocols import Encoding, TextEncoder
from ..progress import OnProgress, silent
from .gate import ordinary_prompts
from .preserved import Preserved
from .tokens import Padding, encode, token_rows

GROUP_ROWS = 1 << 13  # token rows of several concepts worked on at once


class EncodedBook:
    """Token matrices of a book.

    Args:
        encoder: the host's text encoder.
        book: every known concept (old and new) and what must be preserved.
        padding: whether tokens after a prompt's end count.
        ordinary: calibration corpus; the shipped one by default.
        on_progress: called while prompts are read; it may raise :class:`~sepme.errors.Interrupted`.

    Attributes:
        names: the concepts, in the book's order.
        empty: the empty prompt.
        encodings, anchors: by concept.
        preserved: what must not change; its file is read a batch at a time.
        ordinary: prompts that gates are calibrated on, and prompts held out, which verification reads too; each half with its context
            ``(prompts, tokens, d_in)``, or None where it is empty.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        book: ConceptBook,
        padding: Padding,
        ordinary: Sequence[str] | None = None,
        on_progress: OnProgress = silent,
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
        ordinary = ordinary_prompts() if ordinary is None else ordinary
        halves = tuple(ordinary[::2]), tuple(ordinary[1::2])
        self.ordinary = [(half, encode(encoder, half).context if half else None) for half in halves]
        self.preserved = Preserved(encoder, book, on_progress)

    def rows(self, name: str, which: list[bool] | None = None) -> Tensor:
        """Token rows ``(n, d_in)`` float64 of a concept's prompts, or of some of them."""
        encoding = self.encodings[name]
        if which is not None:
            encoding = Encoding(encoding.context[which], encoding.mask[which])
        return token_rows(encoding, self.padding)

    def tokens(self, name: str) -> tuple[Tensor, Tensor]:
        """Tokens C ``(n, d_in)`` of a concept's prompts and its anchor's C*, aligned by position; float64."""
        own, anchor = self.encodings[name], self.anchors[name].context
        anchor = anchor.repeat(1, own.context.shape[1] // anchor.shape[1], 1).expand_as(own.context)
        return self.rows(name), token_rows(Encoding(anchor, own.mask), self.padding)

    @cached_property
    def fingerprint(self) -> EncoderFingerprint:
        """Of the text encoder, at the layer that it was read at."""
        return EncoderFingerprint.of(self.encoder)

    @property
    def row_count(self) -> int:
        """Token rows of all concepts' prompts."""
        masks = (e.mask for e in self.encodings.values())
        return sum(m.numel() if self.padding == "all" else int(m.sum()) for m in masks)

    @cached_property
    def _texts(self) -> dict[str, str]:
        return {c.name: "\n".join(map(normalised, c.prompts)) for c in self.book.concepts}

    def carriers(self, name: str) -> dict[str, list[bool]]:
        """Other concepts with prompts that hold this one's words, and which of their prompts do not; the rest carry it and
        never constrain it (METHOD, section 3)."""
        words = normalised(name)
        found = {o: [not mentions(p, name) for p in self.book[o].prompts] for o, t in self._texts.items() if o != name and words in t}
        return {o: free for o, free in found.items() if not all(free)}

    def constraints(self, name: str, others: Sequence[str]) -> Iterator[Tensor]:
        """Rows of ``A_i`` that other concepts contribute."""
        carriers = self.carriers(name)
        return (self.rows(o, carriers.get(o)) for o in others)

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
