"""The rows of SepME Erase as its one text."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from ..sepme.concepts import Concept, normalised, split_names
from ..sepme.errors import SepMEError
from ..sepme.plan.said import Said, check_said


class Row(NamedTuple):
    """One concept.

    Attributes:
        strength: 0 where it is switched off.
        prompts, anchor: of a concept that is not saved; None: the anchor is found.
        file, content_hash: of a saved delta.
        said: of words near a concept that is not saved.
    """

    name: str
    strength: float = 1.0
    prompts: tuple[str, ...] = ()
    anchor: str | None = None
    file: str = ""
    content_hash: str = ""
    said: Said = Said()

    @property
    def saved(self) -> bool:
        return bool(self.file or self.content_hash)


def parse_rows(text: str) -> list[Row]:
    """Rows from ``[{"name": "van gogh", "on": true, "strength": 0.7, "anchor": "a painting", "prompts": [...]}]`` (all but the name may
    be left out), with ``file`` and ``content_hash`` of saved deltas, or words near the concept under ``stays``, ``same`` and ``free``; or
    from mere names with commas or lines between.

    Raises:
        SepMEError: it can be read as neither; a row without a name, two of one name, a strength that is no number.
    """
    if not text.strip().startswith(("[", "{")):
        data: Any = [{"name": name} for name in split_names(text)]
    else:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
            raise SepMEError('The rows cannot be read; write names with commas between, or a list like [{"name": "van gogh"}].')
    rows = [_row(entry) for entry in data]
    seen = set[str]()
    for row in rows:
        if normalised(row.name) in seen:
            raise SepMEError(f"{row.name!r} is in two rows; remove one of them.")
        seen.add(normalised(row.name))
    check_said({row.name: row.said for row in rows})
    return rows


def _row(entry: dict[str, Any]) -> Row:
    name, strength, prompts, anchor = (entry.get(key) for key in ("name", "strength", "prompts", "anchor"))
    if not isinstance(name, str) or not name.strip():
        raise SepMEError("A row has no name; type what must not be in the pictures, or remove the row.")
    strength = 1.0 if strength is None else strength
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength) or abs(strength) > 100:
        raise SepMEError(f"The strength of {name[:60]!r} is no number between -100 and 100; 1 erases, 0 does nothing.")
    prompts = [] if prompts is None else prompts
    no_text = SepMEError(f"The row {name[:60]!r} has something in it that is no text; remove the row and add it again.")
    try:
        said = Said.from_json(entry)
    except (TypeError, ValueError):
        raise no_text from None
    texts = [anchor or "", entry.get("file") or "", entry.get("content_hash") or ""]
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in (*prompts, *texts)):
        raise no_text
    concept = Concept(name, tuple(prompts), texts[0])  # its name and prompts are good ones
    own = concept.prompts if prompts else ()
    on = bool(entry.get("on", True))
    return Row(concept.name, float(strength) if on else 0.0, own, anchor, texts[1], texts[2].strip().lower(), said)
