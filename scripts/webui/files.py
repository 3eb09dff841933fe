"""Delta files as users name them: by concept, by label (concept and the beginning of the hash), by file or by hash, everywhere the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ...sepme.concepts import normalised
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.facts import DAMAGE, Facts
from ...sepme.delta.format import plain_json, read_header
from ...sepme.delta.library import Entry, resolve
from ...sepme.delta.thumbnail import KEY as THUMBNAIL
from ...sepme.delta.thumbnail import picture
from ...sepme.errors import SepMEError
from ...sepme.files import number
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
    """A concept's name with the start of its file's content hash, which tells files of one concept apart."""
    return f"{entry.concept} [{entry.content_hash[:HASH_LENGTH]}]"


def find(wanted: str, entries: Sequence[Entry]) -> list[Entry]:
    """The files that a text means, best first; of files with the same content one."""
    return list({entries[i].content_hash: entries[i] for i in reversed(resolve(wanted, entries))}.values())[::-1]


def choose(wanted: str, entries: Sequence[Entry], fitting: Sequence[str] = ()) -> Entry | None:
    """The file that a text means; of several the one of the first of these architectures that any has.

    Raises:
        SepMEError: it means several.
    """
    found = find(wanted, entries)
    meant = next((those for a in fitting if (those := [e for e in found if e.architecture == a])), found)
    if len(meant) > 1:
        raise SepMEError(f"{wanted[:60]!r} means several files; write {' or '.join(repr(with_hash(e)) for e in meant[:3])}.")
    return meant[0] if meant else None


def by_hash(digest: str, entries: Sequence[Entry]) -> Entry | None:
    """The file whose content hash begins so."""
    return next((e for e in entries if e.content_hash.startswith(digest)), None)


def by_concept(strengths: Mapping[str, float], chosen: Sequence[Entry], entries: Sequence[Entry]) -> tuple[dict[str, float], list[str]]:
    """Strengths of the chosen files by concept, whatever they were keyed by; and keys of files that are there and not chosen.

    Raises:
        SepMEError: a key that means no file, or several of the chosen ones; two for the same.
    """
    table: dict[str, float] = {}
    idle = []
    for key, strength in strengths.items():
        meant = {e.content_hash for e in find(key, entries)}
        concepts = [e.concept for e in chosen if e.content_hash in meant]
        if not meant:
            names = ", ".join(e.concept for e in chosen) or "none"
            raise SepMEError(f"The strengths name {key[:60]!r}, and there is no such delta; chosen concepts: {names[:200]}.")
        if len(concepts) > 1 or (concepts and concepts[0] in table):
            raise SepMEError(f"In the strengths {key[:60]!r} and another key mean the same, or it means several; name each concept once.")
        if concepts:
            table[concepts[0]] = strength
        else:
            idle.append(key)
    return table, idle


class About(NamedTuple):
    """What lists show of a file: its certificate in one word, and its small picture as a data URL, if it has one."""

    grade: str = "unknown"
    thumbnail: str = ""


def about(entry: Entry) -> About:
    """Nothing is read but the header, and that once for a size and content: a picture changes neither hash nor tensors."""
    return _about(entry.path, entry.content_hash, entry.bytes)


@lru_cache(maxsize=4096)
def _about(path: Path, content_hash: str, size: int) -> About:
    try:
        metadata, _ = read_header(path)
    except SepMEError:
        return About()
    thumbnail = metadata.get(THUMBNAIL, "")
    shown = thumbnail if picture(thumbnail) else ""
    try:
        return About(Facts.from_header(metadata).certificate.grade(number(plain_json(metadata["gate"]))), shown)
    except (SepMEError, *DAMAGE):
        return About(thumbnail=shown)


@dataclass(frozen=True, eq=False)
class Made(Entry):
    """A delta that is no file: of a concept that was only named."""

    delta: ConceptDelta

    @staticmethod
    def of(delta: ConceptDelta) -> Made:
        return Made("", Path(), 0, delta.concept.name, delta.content_hash(), delta.architecture, "", delta)


def load(entry: Entry) -> ConceptDelta:
    """The delta; small files are read once, until they change.

    Raises:
        SepMEError: damaged.
    """
    return entry.delta if isinstance(entry, Made) else _load(str(entry.path), entry.content_hash)


@lru_cache(maxsize=64)
def _load(path: str, content_hash: str) -> ConceptDelta:
    return ConceptDelta.load(path)
