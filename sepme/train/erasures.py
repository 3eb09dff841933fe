"""Deltas of concepts that are only named: anchors and neighbours found, planned together on first use, kept by what went into them.

They are context edits in closed form, so a text encoder is all that is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..concepts import Concept, ConceptBook, normalised
from ..delta.concept_delta import ConceptDelta
from ..delta.library import embed, unembed
from ..errors import SepMEError
from ..files import write_atomically
from ..model.encoder_fingerprint import EncoderFingerprint
from ..model.protocols import TextEncoder, clip_skip, free_length
from ..plan.directions import MANY, PlanOptions
from ..plan.gate import ordinary_prompts
from ..plan.planner import Planner
from ..plan.said import Said
from ..plan.vocabulary import FILE, Vocabulary
from ..progress import OnProgress, silent
from .make import make_deltas
from .options import TrainOptions

OPTIONS = TrainOptions(objective="closed-form", edit="context")
NEARBY = 100  # words near the concepts that must not change: half as many as in training, for somebody waits
PLANS = (PlanOptions(nearby=NEARBY), PlanOptions(mode="soft", nearby=NEARBY))  # the second for many, and where the first is not safe
MAX_SETS = 32  # in memory
MAX_BYTES = 64 << 20  # on disk
VERSION = 3  # of what is made of a name


class Named(NamedTuple):
    """A concept as somebody names it.

    Attributes:
        prompts: that mean it; those of the templates if empty.
        anchor: what takes its place; found if None.
        said: of words near it.
    """

    name: str
    prompts: tuple[str, ...] = ()
    anchor: str | None = None
    said: Said = Said()


def named(concepts: Sequence[str | Concept | Named]) -> tuple[Named, ...]:
    """Names and concepts as :class:`Named`; a concept's anchor is taken as it is, also the empty one."""
    given = [Named(c) if isinstance(c, str) else c if isinstance(c, Named) else Named(c.name, c.prompts, c.anchor) for c in concepts]
    return tuple(n._replace(name=Concept(n.name, n.prompts, n.anchor or "").name) for n in given)


def book_of(
    encoder: TextEncoder,
    wanted: Sequence[Named],
    preserve: Sequence[str] = (),
    known: Sequence[Concept] = (),
    on_progress: OnProgress = silent,
) -> ConceptBook:
    """The book of named concepts, in an order that does not depend on theirs, with anchors found where none are given.

    Args:
        preserve: prompts that must not change at all.
        known: concepts that others erase already.

    Raises:
        SepMEError: a name that is none, two of one name, or a prompt that is erased and preserved at once.
    """
    concepts = []
    for n in sorted(wanted, key=lambda n: normalised(n.name)):
        found = Vocabulary.of(encoder, on_progress).anchor(encoder, n.name) if n.anchor is None else n.anchor
        concept = Concept(n.name, n.prompts, found)
        prompts = dict.fromkeys((*concept.prompts, *n.said.same))
        concepts.append(replace(concept, prompts=tuple(prompts)) if n.said.same else concept)
    return ConceptBook((*known, *concepts), tuple(dict.fromkeys((*preserve, *(w for n in wanted for w in n.said.stays)))))


def neighbours(encoder: TextEncoder, book: ConceptBook, names: Sequence[str]) -> dict[str, list[str]]:
    """The shipped words nearest to each of these concepts that stand in no prompt of the book."""
    texts = [t for c in book.concepts for t in (c.name, *c.prompts)]
    vocabulary = Vocabulary.of(encoder)
    return {name: vocabulary.nearby(encoder, name, texts) for name in names}


class Erasures:
    """What was made of named concepts: in memory, and in a folder where there is one, which may be deleted at any time.

    Args:
        folder: called for the folder; None keeps nothing on disk.
        limit: bytes there; the longest unused sets go first.
    """

    def __init__(self, folder: Callable[[], Path] | None = None, limit: int = MAX_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._sets: OrderedDict[str, tuple[ConceptDelta, ...]] = OrderedDict()

    def get(
        self,
        encoder: TextEncoder,
        concepts: Sequence[str | Concept | Named],
        preserve: Sequence[str] = (),
        known: Sequence[Concept] = (),
        on_progress: OnProgress = silent,
    ) -> tuple[ConceptDelta, ...]:
        """The deltas of these concepts, in their order; made together unless the same set was made before, in any order.

        Args:
            encoder: the host's; its fingerprint is part of what a set is known by.
            preserve, known: see :func:`book_of`.

        Raises:
            SepMEError: see :func:`book_of`; no room for a concept.
            Interrupted: by ``on_progress``.
        """
        wanted = sorted(named(concepts), key=lambda n: normalised(n.name))
        key = _key(encoder, wanted, preserve, known)
        made = self._sets.get(key) or self._load(key, wanted)
        if made is None:
            made = _made(encoder, wanted, preserve, known, on_progress)
            self._store(key, made)
        self._sets[key] = made
        self._sets.move_to_end(key)
        while len(self._sets) > MAX_SETS:
            self._sets.popitem(last=False)
        by_name = {normalised(d.concept.name): d for d in made}
        return tuple(by_name[normalised(n.name)] for n in named(concepts))

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder() / f"{key}.json"

    def _load(self, key: str, wanted: Sequence[Named]) -> tuple[ConceptDelta, ...] | None:
        """A set from disk; None if it is not there, or damaged, or another one's."""
        path = self._path(key)
        if path is None:
            return None
        try:
            made = tuple(unembed(text) for text in json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):  # SepMEError is a ValueError
            return None
        with suppress(OSError):
            os.utime(path)
        return made if [d.concept.name for d in made] == [n.name for n in wanted] else None

    def _store(self, key: str, made: tuple[ConceptDelta, ...]) -> None:
        """Write a set to disk, and make room; a disk that takes none is no error, the set is in memory."""
        path = self._path(key)
        if path is None:
            return
        with suppress(SepMEError, OSError):
            write_atomically(path, json.dumps([embed(d) for d in made]).encode())
            files = sorted(((p.stat().st_mtime_ns, p.stat().st_size, p) for p in path.parent.glob("*.json")), reverse=True)
            total = 0
            for _, size, file in files:
                total += size
                if total > self._limit:
                    file.unlink(missing_ok=True)


def _key(encoder: TextEncoder, wanted: Sequence[Named], preserve: Sequence[str], known: Sequence[Concept]) -> str:
    facts = [
        VERSION,
        hashlib.sha256(FILE.read_bytes()).hexdigest(),
        EncoderFingerprint.of(encoder).to_json(),
        clip_skip(encoder),
        [(n.name, n.prompts, n.anchor, n.said.to_json()) for n in wanted],
        list(preserve),
        [(c.name, c.prompts, c.anchor) for c in known],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _made(
    encoder: TextEncoder, wanted: Sequence[Named], preserve: Sequence[str], known: Sequence[Concept], on_progress: OnProgress
) -> tuple[ConceptDelta, ...]:
    book = book_of(encoder, wanted, preserve, known, on_progress)
    names = [n.name for n in wanted]
    near, said = neighbours(encoder, book, names), {n.name: n.said for n in wanted}
    ordinary: tuple[str, ...] = ordinary_prompts()
    if free_length(encoder):  # no other words are looked for: these calibrate gates, and are held out
        ordinary += tuple(word for word in dict.fromkeys(chain(*near.values())) for _ in range(2))
    planner = Planner(encoder, book, PLANS[0], ordinary, on_progress, said, near)
    best = _planned(planner, names, final=False) if len(book.concepts) < MANY else {}
    if todo := [n for n in names if n not in best or _wrong(best[n])]:
        for name, delta in _planned(planner.with_options(PLANS[1]), todo, final=len(best) < len(names)).items():
            if name not in best or _wrong(delta) < _wrong(best[name]):
                best[name] = delta
    return tuple(replace(best[n], file="") for n in names)


def _planned(planner: Planner, names: Sequence[str], final: bool) -> dict[str, ConceptDelta]:
    """The deltas by name; none where there is no room, unless it is ``final``, which raises SepMEError."""
    try:
        planner.plan_all(names)
    except SepMEError:
        if final:
            raise
        return {}
    return {n: make_deltas(planner, [n], None, OPTIONS)[0] for n in names}


def _wrong(delta: ConceptDelta) -> float:
    """Share of nearby words that change and of own prompts that slip through."""
    return sum(tally.share for tally in (delta.certificate.collateral, delta.certificate.misses) if tally is not None)
