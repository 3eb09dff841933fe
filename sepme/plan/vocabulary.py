"""Ordinary words as a text encoder reads them: which are near a concept, and which broader thing may take its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..concepts import mentions, normalised
from ..model.encoder_fingerprint import EncoderFingerprint
from ..model.protocols import TextEncoder
from ..progress import OnProgress, silent
from .gate import ordinary_prompts
from .tokens import CHUNK, encode, means

FILE = Path(__file__).parents[1] / "data" / "broader_words.txt"
NEARBY = 32  # neighbours of a concept
SYNONYM = 0.95  # cosine from which on a word is taken to mean the concept itself
KEPT_ENCODERS = 4

_read: OrderedDict[EncoderFingerprint, Vocabulary] = OrderedDict()


@dataclass(frozen=True)
class Kind:
    """A broader thing: what may stand for it, best first, and examples of it."""

    anchors: tuple[str, ...]
    examples: tuple[str, ...]


@cache
def kinds() -> tuple[tuple[Kind, ...], frozenset[str]]:
    """The shipped kinds of things, and the adjectives that an anchor takes over from a concept's name."""
    found, adjectives = list[Kind](), frozenset[str]()
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        left, right = ([w.strip() for w in part.split(",")] for part in line.split(":", 1))
        if left == ["with"]:
            adjectives = frozenset(right)
        else:
            found.append(Kind(tuple(left), tuple(right)))
    return tuple(found), adjectives


@cache
def shipped_texts() -> frozenset[str]:
    """All texts that planning reads whatever the concepts are: ordinary prompts and the words."""
    return frozenset((*ordinary_prompts(), *(w for kind in kinds()[0] for w in (*kind.examples, *kind.anchors))))


class Vocabulary:
    """The shipped words, read once by a text encoder.

    Args:
        encoder: the host's.
        on_progress: called while the words are read; it may raise :class:`~sepme.errors.Interrupted`.
    """

    def __init__(self, encoder: TextEncoder, on_progress: OnProgress = silent) -> None:
        self.kinds, self._adjectives = kinds()
        words = list(dict.fromkeys(w for kind in self.kinds for w in (*kind.examples, *kind.anchors)))
        self._empty = int(encoder.encode([""]).mask.sum())
        read = dict[str, Tensor]()
        for i in range(0, len(words), CHUNK):
            on_progress("Reading words", i, len(words))
            features, lengths = self._features(encoder, words[i : i + CHUNK])
            for word, row, length in zip(words[i : i + CHUNK], features, lengths, strict=True):
                if length <= len(word.replace("-", " ").split()):  # a word in pieces is none that the encoder learned
                    read[word] = row
        self._read = read
        self.words = tuple(dict.fromkeys(w for kind in self.kinds for w in kind.examples if w in read))
        rows = torch.stack([read[w] for w in self.words]) if self.words else torch.zeros(0, 1)
        self._mean = rows.mean(0) if self.words else rows
        self._rows = torch.nn.functional.normalize(rows - self._mean, dim=-1)

    @staticmethod
    def of(encoder: TextEncoder, on_progress: OnProgress = silent) -> Vocabulary:
        """The vocabulary of an encoder; those of the last few encoders are remembered by their fingerprints."""
        key = EncoderFingerprint.of(encoder)
        if key not in _read:
            _read[key] = Vocabulary(encoder, on_progress)
        _read.move_to_end(key)
        while len(_read) > KEPT_ENCODERS:
            _read.popitem(last=False)
        return _read[key]

    def _features(self, encoder: TextEncoder, texts: list[str]) -> tuple[Tensor, list[int]]:
        """Mean direction of each text's tokens ``(texts, d_in)`` float32, and how many tokens each has beyond the empty prompt's."""
        encoding = encode(encoder, texts)
        return means(encoding), [int(n) - self._empty for n in encoding.mask.sum(1)]

    def similarities(self, encoder: TextEncoder, name: str) -> Tensor:
        """Cosines ``(words,)`` between a name and the words, their common part taken out."""
        if not self.words:
            return torch.zeros(0)
        own, _ = self._features(encoder, [name])
        return self._rows @ torch.nn.functional.normalize(own[0] - self._mean, dim=-1)

    def nearby(self, encoder: TextEncoder, name: str, but: Collection[str] = (), count: int = NEARBY) -> list[str]:
        """The nearest words, best first, without synonyms of the concept, what shares a word with it, and what stands in texts ``but``."""
        values = self.similarities(encoder, name)
        own, found = set(normalised(name).split()), list[str]()
        for i in values.argsort(descending=True).tolist():
            word = self.words[i]
            if len(found) == count:
                break
            if values[i] < SYNONYM and own.isdisjoint(word.split()) and not any(mentions(t, word) for t in but):
                found.append(word)
        return found

    def anchor(self, encoder: TextEncoder, name: str) -> str:
        """What takes a concept's place: the broader thing that it is, in words that the encoder knows, with the adjectives of its name.

        A concept that is listed, or whose last word is, is looked up; any other is of the kind of its nearest word. Without known words
        it is the empty prompt.
        """
        plain = normalised(name)
        *before, last = plain.split()
        listed = {word: kind for kind in reversed(self.kinds) for word in kind.examples}
        kind = listed.get(plain) or listed.get(last)
        if kind is None and self.words:
            kind = listed[self.words[int(self.similarities(encoder, name).argmax())]]
        for anchor in kind.anchors if kind else ():
            if anchor in self._read and not mentions(anchor, name):
                return _with([w for w in before if w in self._adjectives], anchor)
        return ""


def _with(adjectives: Iterable[str], thing: str) -> str:
    """``a shape`` with ``red``: ``a red shape``."""
    article, _, noun = thing.partition(" ")
    words = list(adjectives)
    if not words:
        return thing
    if article not in ("a", "an"):
        return " ".join([*words, thing])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words, noun])


def nearby_words(encoder: TextEncoder, concept: str, but: Collection[str] = (), count: int = NEARBY) -> list[str]:
    """The words nearest to a concept among the shipped ones, as this encoder reads them; see :meth:`Vocabulary.nearby`."""
    return Vocabulary.of(encoder).nearby(encoder, concept, but, count)
