"""What a workflow says of its deltas beyond a file name: how to make one again, and, if asked, the delta itself.

It stands in ``workflow.extra.sepme`` by content hash, where the front end keeps it in saved workflows, and SaveImage in PNGs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.library import embed, unembed

KEY = "sepme"
SETTINGS = ("objective", "mode", "steps", "learning_rate", "seed", "edit", "batch", "max_rank", "nearby")  # inputs of SepME Train
MAX_KNOWN = 32 << 10  # characters: beyond, a record keeps the known concepts' names without their prompts
DeltaRecord = dict[str, Any]


def record(delta: ConceptDelta, file: str, embedded: bool) -> DeltaRecord:
    """What a workflow remembers of a delta; ``data`` is the file itself."""
    facts: DeltaRecord = {
        "concept": delta.concept.name,
        "prompts": list(delta.concept.prompts),
        "anchor": delta.concept.anchor,
        "file": file,
    }
    facts["train"] = {k: v for k, v in delta.recipe.settings.items() if k in SETTINGS}
    known = [{"name": c.name, "prompts": list(c.prompts)} for c in delta.known]
    facts["known"] = known if len(json.dumps(known)) <= MAX_KNOWN else [c.name for c in delta.known]
    facts["preserve"] = list(delta.preserve.prompts)
    return facts | ({"data": embed(delta)} if embedded else {})


def remember(extra_pnginfo: Any, content_hash: str, entry: DeltaRecord) -> None:
    """Put a record into the workflow that is running; without one (a bare API prompt) nothing happens."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    if isinstance(workflow, dict):
        extra = workflow.get("extra")
        if not isinstance(extra, dict):
            extra = workflow["extra"] = {}
        records = extra.get(KEY)
        if not isinstance(records, dict):
            records = extra[KEY] = {}
        old = records.get(content_hash)
        records[content_hash] = (old if isinstance(old, dict) else {}) | entry


def recall(extra_pnginfo: Any, content_hash: str, name: str) -> DeltaRecord | None:
    """The record of this hash, or, without one, of this file name."""
    records: Any = extra_pnginfo
    for key in ("workflow", "extra", KEY):
        records = records.get(key) if isinstance(records, Mapping) else None
    if not isinstance(records, Mapping):
        return None
    found = [r for h, r in records.items() if isinstance(r, dict) and (h == content_hash if content_hash else r.get("file") == name)]
    return found[0] if found else None


def carried(entry: DeltaRecord | None) -> ConceptDelta | None:
    """The delta inside a record, checked like a file."""
    data = entry.get("data") if entry else None
    return unembed(data) if isinstance(data, str) else None


def again(entry: DeltaRecord | None) -> str:
    """How to make a delta again, in a sentence."""
    if entry is None:
        return "this workflow holds no recipe for it, so ask whoever made it for the file"
    train = entry.get("train")
    settings = ", ".join(f"{k} {v}" for k, v in train.items()) if isinstance(train, dict) else ""
    prompts = entry.get("prompts")
    listed = "; ".join(map(str, prompts)) if isinstance(prompts, list) else ""
    anchor = f", anchor {entry['anchor']!r}" if entry.get("anchor") else ""
    return f"or make it again: SepME Concept {entry.get('concept')!r} with the prompts [{listed}]{anchor} and SepME Train with {settings}"
