"""What an erasure must leave alone though nobody named it: words near the concepts; and the concepts beside other things.

One part of the prompts is preserved and calibrates gates, the other is held out, for the certificate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice, zip_longest
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept, ConceptBook, mentions, normalised
from ..model.protocols import Encoding, TextEncoder, free_length
from ..model.words import word_table
from ..progress import OnProgress, silent
from .gate import extremes
from .said import Said, check_said
from .tally import Tally
from .tokens import CHUNK, encode, means
from .vocabulary import SYNONYM, Vocabulary

COUNT = 200  # words by default
FEW = 10 * COUNT  # words of a vocabulary that is looked at as a whole then
LISTED = 64  # words near a concept that its file names
SPREAD = 4  # every so many words are of the rest of the vocabulary
BESIDE = 160, 1200  # other words that each concept is named with, and all concepts together
PLAIN = ("a {}", "a photo of {}", "{} style")
HELD_OUT = ("a picture of {}", "one {}", "a drawing of a {}", "in {} style")
TOGETHER = ("a {0} {1}", "{1}, {0}", "{0} {1}", "a {1} and a {0}", "a {0} {2} {1}")
TOGETHER_HELD_OUT = ("a photo of a {0} {1}", "{0}, a {1}", "a picture of a {1}, {0} style", "one {0} {1}", "a {0} {1}, {2}")


@dataclass(frozen=True)
class Beside:
    """Prompts of a concept that its book does not hold: other templates, synonyms, and beside other words."""

    calibration: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nearby:
    """Words near a book's concepts, in prompts.

    Attributes:
        words: none of them a concept's name, synonym or prompt, unless somebody says that it stays.
        near: by concept, those of them that are near it, the nearest first.
        synonyms: by concept, words that are taken to mean it.
        prompts: what is preserved and calibrates gates.
        held_out: by word, prompts that nothing is planned with.
        beside: by concept.
    """

    words: tuple[str, ...] = ()
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    held_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beside: Mapping[str, Beside] = field(default_factory=dict)
    near: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    said: Mapping[str, Said] = field(default_factory=dict)

    @staticmethod
    def of(
        encoder: TextEncoder,
        book: ConceptBook,
        count: int,
        on_progress: OnProgress = silent,
        said: Mapping[str, Said] | None = None,
        near: Mapping[str, Sequence[str]] | None = None,
    ) -> Nearby:
        """Find ``count`` words of the tokenizer's own, those nearest to each concept and some of the rest.

        All words of a vocabulary that has at most twice as many; where at least ``COUNT`` are wanted and it has at most ``FEW``, all others
        too, in one prompt each.

        Encoders that do not tell their words are asked for the shipped ones. Where prompts have any length (T5, language models), nothing
        is looked for: reading so many takes such encoders an hour.

        Args:
            said: by concept, what is known of words better than it can be found.
            near: by concept, words that are known to be near it, the nearest first; they count as much as those that are found.

        Raises:
            SepMEError: it contradicts itself.
        """
        said = said or {}
        check_said(said)
        if count == 0 or free_length(encoder):
            return Nearby()
        every, found = _ranked(encoder, book.concepts, 4 * count, on_progress)
        ranked = [list(_in_turn([(near or {}).get(c.name, ()), r])) for c, r in zip(book.concepts, found, strict=True)]
        alike = [_alike(concept) for concept in book.concepts]
        stays = tuple(dict.fromkeys(w for s in said.values() for w in s.stays))
        other = {w for s in said.values() for w in (*s.same, *s.free)}
        kept = {normalised(p) for p in book.preserve} | set(stays)

        def free(word: str) -> bool:
            return word in kept or (word not in other and not any(word in a for a in alike))

        if len(every) > 2 * count:
            chosen = list(islice((w for w in _in_turn(ranked) if free(w)), count - count // SPREAD))
            taken = frozenset(chosen)
            rest = [w for w in every if w not in taken and free(w)]
            chosen += rest[:: max(1, len(rest) // (count // SPREAD))][: count // SPREAD]
        else:
            chosen = [w for w in every if free(w)]
        chosen = list(dict.fromkeys((*stays, *chosen)))
        close = frozenset(chosen)
        if count >= COUNT and len(every) <= FEW:
            chosen += [w for w in every if w not in close and free(w)]
        synonyms = _synonyms(encoder, book, [w for w in chosen if w not in kept], every)
        for name, of_one in said.items():
            synonyms[name] = tuple(w for w in dict.fromkeys((*synonyms[name], *of_one.same)) if w not in (*of_one.free, *stays))
        means_one = {w for words in synonyms.values() for w in words}
        words = tuple(w for w in chosen if w not in means_one)
        own = {normalised(p) for c in book.concepts for p in c.prompts}

        def others(prompts: Sequence[str]) -> tuple[str, ...]:
            free = (p for p in dict.fromkeys(prompts) if normalised(p) not in own | kept)
            return tuple(p for p in free if not any(mentions(p, c.name) for c in book.concepts))

        prompts, held = list[str](), dict[str, tuple[str, ...]]()
        for i, word in enumerate(words):
            after, more, yet = (words[(7 * i + k) % len(words)] for k in (1, 3, 4))
            prompts.append(PLAIN[i % len(PLAIN)].format(word))
            held_out = [HELD_OUT[i % len(HELD_OUT)].format(word)]
            if word in close:
                prompts += [word, TOGETHER[i % len(TOGETHER)].format(word, after, more)]
                held_out.append(TOGETHER_HELD_OUT[i % len(TOGETHER_HELD_OUT)].format(word, more, yet))
            held[word] = others(held_out)
        planned = frozenset(prompts)
        held = {word: tuple(p for p in texts if p not in planned) for word, texts in held.items()}
        beside = {c.name: _beside(book, c, words, r, synonyms[c.name]) for c, r in zip(book.concepts, ranked, strict=True)}
        of_words = frozenset(words)
        by_name = {c.name: tuple(w for w in r if w in of_words) for c, r in zip(book.concepts, ranked, strict=True)}
        return Nearby(words, synonyms, others(prompts), held, beside, by_name, said)

    def to_json(self, name: str) -> dict[str, Any]:
        """What a delta's header says of it."""
        said = self.said.get(name, Said())
        near = list(dict.fromkeys((*said.stays, *self.near.get(name, ()))))[:LISTED]
        facts = {"words": len(self.words), "prompts": len(self.prompts), "synonyms": list(self.synonyms.get(name, ())), "near": near}
        return facts | ({"said": said.to_json()} if said.to_json() else {})


def _ranked(
    encoder: TextEncoder, concepts: Sequence[Concept], count: int, on_progress: OnProgress
) -> tuple[Sequence[str], list[list[str]]]:
    """All words of the vocabulary, and ``count`` of them by concept, the nearest first."""
    table = word_table(encoder)
    if table is not None:
        return table.words, [table.nearest(c.name)[:count] for c in concepts]
    words = Vocabulary.of(encoder, on_progress)
    orders = (words.similarities(encoder, c.name).argsort(descending=True, stable=True)[:count].tolist() for c in concepts)
    return words.words, [[words.words[i] for i in order] for order in orders]


def _alike(concept: Concept) -> frozenset[str]:
    """Words that no word near a concept may be: those of its name, its plural, and of its prompts in other words."""
    name = normalised(concept.name)
    texts = [name, f"{name}s", f"{name}es", name.removesuffix("s"), *(normalised(p) for p in concept.prompts if not mentions(p, name))]
    return frozenset(word for text in texts for word in text.split())


def _in_turn(lists: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first of each list, the second of each, ..., each word once."""
    return iter(dict.fromkeys(word for row in zip_longest(*lists) for word in row if word is not None))


def _synonyms(encoder: TextEncoder, book: ConceptBook, words: Sequence[str], every: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Words that the encoder reads nearly as it reads a concept's name, and plurals of it that it knows."""
    known = frozenset(every)
    plurals = {c.name: [w for w in (f"{normalised(c.name)}s", f"{normalised(c.name)}es") if w in known] for c in book.concepts}
    found = {name: list(given) for name, given in plurals.items()}
    if words:
        rows = torch.cat([_features(encoder, words[i : i + CHUNK]) for i in range(0, len(words), CHUNK)])
        mean = rows.mean(0)
        names = torch.nn.functional.normalize(_features(encoder, [c.name for c in book.concepts]) - mean, dim=-1)
        for i, j in (torch.nn.functional.normalize(rows - mean, dim=-1) @ names.T >= SYNONYM).nonzero().tolist():
            found[book.concepts[j].name].append(words[i])
    return {name: tuple(dict.fromkeys(given)) for name, given in found.items()}


def _features(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    return means(encode(encoder, texts))


def _beside(book: ConceptBook, concept: Concept, words: Sequence[str], ranked: Sequence[str], synonyms: Sequence[str]) -> Beside:
    """A concept beside the other concepts, near words and some of the rest, and in templates that are not its own."""
    count = max(8, min(BESIDE[0], BESIDE[1] // len(book.concepts)))
    others = [c.name for c in book.concepts if c is not concept and not mentions(c.name, concept.name)]
    others += [p for p in book.preserve if p in frozenset(words)]
    near = [w for w in ranked if w in frozenset(words) - frozenset(others)][: count // 2]
    rest = [w for w in words if w not in frozenset([*others, *near])]
    others = [*others[:count], *near, *rest[:: max(1, len(rest) // max(1, count - len(others) - len(near)))]][:count]
    name, own, beyond = concept.name, {normalised(p) for p in concept.prompts}, others[1:] + others[:1]
    parts = [list(synonyms), [t.format(text) for text in (name, *synonyms) for t in HELD_OUT]]
    for part, start, templates in zip(parts, (0, 1), (TOGETHER, TOGETHER_HELD_OUT), strict=True):
        rows = zip(others[start::2], beyond[start::2], cycle(templates), strict=False)
        part += [t.format(one, name, other) for one, other, t in rows]
    return Beside(*(tuple(p for p in dict.fromkeys(part) if normalised(p) not in own) for part in parts))


class NearbyPrompts:
    """The prompts of :class:`Nearby` as an encoder reads them."""

    def __init__(self, encoder: TextEncoder, nearby: Nearby, on_progress: OnProgress = silent) -> None:
        self.found, self._encoder, self._on_progress = nearby, encoder, on_progress

    @cached_property
    def encodings(self) -> list[Encoding]:
        """Of what is preserved, a few hundred prompts each; read once, used for directions and for gates."""
        prompts, parts = self.found.prompts, []
        for i in range(0, len(prompts), CHUNK):
            self._on_progress("Nearby words", i, len(prompts))
            parts.append(encode(self._encoder, prompts[i : i + CHUNK]))
        return parts


def nearby_values(
    encoder: TextEncoder, found: Nearby, abreast: Tensor, measured: bool, on_progress: OnProgress = silent
) -> dict[str, dict[str, Tensor]]:
    """Largest gate statistic ``(deltas,)`` of the prompts with nearby words that nothing was planned with, by word and prompt.

    Args:
        abreast, measured: see :func:`~sepme.plan.gate.extremes`.
    """
    held = [(word, prompt) for word, prompts in found.held_out.items() for prompt in prompts]
    values: dict[str, dict[str, Tensor]] = {}
    for i in range(0, len(held), CHUNK):
        on_progress("Nearby words: measuring", i, len(held))
        part = held[i : i + CHUNK]
        rows = extremes(encode(encoder, [p for _, p in part]).context, abreast, measured)[0]
        for (word, prompt), row in zip(part, rows, strict=True):
            values.setdefault(word, {})[prompt] = row
    return values


def least(encoder: TextEncoder, prompts: Sequence[str], down: Tensor, measured: bool) -> dict[str, float]:
    """Smallest gate statistic of each of some prompts under one delta's Dᵀ ``(k, d_in)``."""
    if not prompts:
        return {}
    return dict(zip(prompts, extremes(encode(encoder, prompts).context, down[:, None], measured)[1][:, 0].tolist(), strict=True))


def misses(encoder: TextEncoder, found: Nearby, name: str, down: Tensor, gate: float, measured: bool) -> Tally:
    """Of a concept's prompts that nothing was planned with those that its gate stays shut for."""
    values = least(encoder, found.beside.get(name, Beside()).held_out, down, measured)
    return Tally.above({prompt: gate - value for prompt, value in values.items()})
