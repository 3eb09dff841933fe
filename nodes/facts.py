"""What the page shows of a delta: what its header says, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from math import isnan, nan
from pathlib import Path
from typing import Any

from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.facts import DAMAGE, Facts
from ..sepme.delta.format import plain_json, read_header
from ..sepme.delta.library import Entry
from ..sepme.delta.thumbnail import KEY as THUMBNAIL
from ..sepme.delta.thumbnail import Picture, picture
from ..sepme.files import number
from ..sepme.model.families import fits

PageFacts = dict[str, Any]

SHOWN, MAX_KNOWN = 64, 1024  # prompts and known concepts that are listed


def describe(entry: Entry, copies: Sequence[str] = ()) -> PageFacts:
    """The facts of a file, with the names of others that hold the same; nothing is read but the header, and that once."""
    stat = entry.path.stat()
    facts = _of_header(entry.path, stat.st_mtime_ns, stat.st_size)
    return {"name": entry.name, "bytes": entry.bytes, "date": int(1000 * stat.st_mtime), "copies": list(copies), **json.loads(facts)}


@lru_cache(maxsize=4096)
def _of_header(path: Path, mtime: int, size: int) -> str:
    """As text: the cache must not be changed by who gets it, and text is small. Damaged parts are left out."""
    metadata, declared = read_header(path)
    gate, rank, prompts = nan, 0, list[str]()
    with suppress(*DAMAGE):
        gate = number(plain_json(metadata["gate"]))
    with suppress(*DAMAGE):
        rank = int(declared["down"]["shape"][0])
    with suppress(*DAMAGE):
        prompts = [str(prompt) for prompt in plain_json(metadata["prompts"])]
    concept, content_hash, architecture = (metadata.get(key, "") for key in ("concept", "content_hash", "architecture"))
    known = _facts(concept, content_hash, architecture, rank, prompts, gate, Facts.from_header(metadata))
    return json.dumps(known | {"thumbnail": picture(metadata.get(THUMBNAIL, "")) is not None})


def thumbnail_of(entry: Entry) -> Picture | None:
    """The small picture of a file, from its header."""
    return picture(read_header(entry.path)[0].get(THUMBNAIL, ""))


def facts_of_delta(delta: ConceptDelta) -> PageFacts:
    """The facts of a delta in memory."""
    names = delta.concept.name, delta.content_hash(), delta.architecture
    return _facts(*names, delta.rank, delta.concept.prompts, delta.gate, delta.facts) | {"bytes": len(delta.to_bytes())}


def _facts(concept: str, content_hash: str, architecture: str, rank: int, prompts: Sequence[str], gate: float, facts: Facts) -> PageFacts:
    certificate = facts.certificate
    figures = certificate.to_json()
    return {
        "concept": concept,
        "content_hash": content_hash,
        "architecture": architecture,
        "fits": fits(architecture),
        "kv_fingerprint": facts.kv_fingerprint,
        "rank": rank,
        "prompts": list(prompts[:SHOWN]),
        "known": [c.name for c in facts.known[:MAX_KNOWN]],
        "train": facts.recipe.settings,
        "clip_skip": facts.clip_skip,
        "gate": None if isnan(gate) else gate,
        **{key: figures[key] for key in ("gate_low", "gate_high", "false_touch_rate", "kept_energy")},
        "leakage": certificate.worst_leakage,
        "leakage_gated": certificate.worst_leakage_gated,
        "leakage_by_name": certificate.leakage_linear,
        "grade": certificate.grade(gate),
        "verdict": certificate.verdict(gate),
        "collateral": figures["collateral"],
        "misses": figures["misses"],
    }
