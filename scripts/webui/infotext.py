"""What a picture's infotext says of the deltas that were on: ``van gogh (0123456789): 1, star (abcdef0123): 0.5``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KEYS = CONCEPTS, GATE, TAGS, NOTE, NAMED = "SepME concepts", "SepME gate", "SepME tags", "SepME note", "SepME erase"
HASH_LENGTH = 10
_END = rf" \(([0-9a-f]{{{HASH_LENGTH}}})\): (-?[0-9.]+(?:e[-+]?[0-9]+)?)(?:, |$)"
_RECORD = re.compile(rf'(?:"((?:[^"]|"")*)"|(.+?)){_END}', re.DOTALL)


class Record(NamedTuple):
    """A delta that was on."""

    name: str
    hash: str
    strength: float


def write(records: Sequence[Record]) -> str:
    """Records as one field of an infotext: ``name (hash): strength``, separated by commas."""
    return ", ".join(f"{_quoted(r.name)} ({r.hash[:HASH_LENGTH]}): {r.strength:g}" for r in records)


def _quoted(name: str) -> str:
    """In quotes, its own doubled, where a name would be read as something else."""
    return '"{}"'.format(name.replace('"', '""')) if name.startswith('"') or re.search(_END, name) else name


def read(params: Mapping[str, str], key: str = CONCEPTS) -> list[Record] | None:
    """The records of a parsed infotext; None where it says nothing of a picture's settings at all."""
    if key in params:
        found = _RECORD.findall(params[key])
        return [Record(quoted.replace('""', '"') or plain, digest, float(strength)) for quoted, plain, digest, strength in found]
    return [] if "Steps" in params else None
