"""Delta files as the panel names them: by concept where that is enough, with the beginning of the hash where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from ...sepme.concepts import normalised
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.library import Entry
from .infotext import HASH_LENGTH


def labels(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The files that the panel offers, by label; of files with the same content one."""
    unique = {e.content_hash: e for e in reversed(entries)}.values()
    names = Counter(normalised(e.concept) for e in unique)
    named = {e.concept if names[normalised(e.concept)] == 1 else with_hash(e): e for e in unique}
    return dict(sorted(named.items(), key=lambda item: normalised(item[0])))


def label_of(entry: Entry, entries: Sequence[Entry]) -> str:
    """How the panel names a file."""
    return next((label for label, e in labels(entries).items() if e.content_hash == entry.content_hash), entry.concept)


def with_hash(entry: Entry) -> str:
    return f"{entry.concept} [{entry.content_hash[:HASH_LENGTH]}]"


def choose(wanted: str, entries: Sequence[Entry], architecture: str) -> Entry | None:
    """The file that a label, concept name, file name or hash means; of several the one for this architecture."""
    key = normalised(wanted)
    found = [e for e in entries if key in (normalised(e.concept), normalised(with_hash(e)), normalised(e.name), e.content_hash)]
    fitting = [e for e in found if e.architecture == architecture]
    return next(iter(fitting or found), None)


def by_hash(digest: str, entries: Sequence[Entry]) -> Entry | None:
    """The file whose content hash begins so."""
    return next((e for e in entries if e.content_hash.startswith(digest)), None)


def load(entry: Entry) -> ConceptDelta:
    """The delta; small files are read once, until they change.

    Raises:
        SepMEError: damaged.
    """
    return _load(str(entry.path), entry.content_hash)


@lru_cache(maxsize=64)
def _load(path: str, content_hash: str) -> ConceptDelta:
    return ConceptDelta.load(path)
