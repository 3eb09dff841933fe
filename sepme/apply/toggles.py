"""Toggles: strengths by concept name, from prompt tags, JSON, or both. Data, never state on a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..concepts import normalised
from ..delta.concept_delta import ConceptDelta
from ..delta.library import resolve
from ..errors import SepMEError

Toggles = Mapping[str, float]
_TAG = re.compile(r"<(erase|keep):([^<>]*)>", re.IGNORECASE)
_COLONS = ":：︰﹕∶;；="
_LIKE_A_TAG = re.compile(rf"(?:[<＜〈《‹«]|&lt;)\s*[/\\]?\s*(?:erase|keep)(?=[\s{_COLONS}>＞〉》›»&]|$)", re.IGNORECASE)
_SYNTAX = "write <erase:name>, <erase:name:strength> or <keep:name>"
_SEPARATOR_BEFORE = re.compile(r"(?:,\s?|\s)\Z")
_SEPARATOR_AFTER = re.compile(r"\s?,\s?|\s")
_EMPTY_EMPHASIS = re.compile(r"\s*(?::\s*[-+\d.]+\s*)?\)|\s*\]")


def parse_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """Take ``<erase:name>``, ``<erase:name:0.7>`` and ``<keep:name>`` out of a prompt.

    A tag goes with the one separator (space, line break, comma) that was put in for it; everything else keeps its bytes. Emphasis
    around nothing but tags goes with them.

    Returns:
        the prompt without tags and strengths by name; the last tag of a name wins.

    Raises:
        SepMEError: what looks like a tag but cannot be read; a tag without a name, with a strength that is no number, or scheduled.
    """
    found: list[dict[str, float]] = []
    before, rest = "", prompt
    while like := _LIKE_A_TAG.search(rest):
        tag = _TAG.match(rest, like.start())
        if tag is None or rest[: tag.start()].endswith("\\"):
            end = re.search(r"[<>＞〉》›»\n]", rest[like.end() :])
            shown = rest[like.start() : like.end() + (end.end() if end else 60)][:60]
            raise SepMEError(f"The tag {shown.strip()!r} cannot be read; {_SYNTAX}.")
        found.append(_toggle(tag[1].lower(), tag[2], f"tag {tag[0][:60]!r}"))
        before, rest = _without_separator(before + rest[: tag.start()], rest[tag.end() :], tag[0])
    cleaned = before + rest
    if found and (like := _LIKE_A_TAG.search(cleaned)):
        raise SepMEError(f"One tag stands inside another at {cleaned[like.start() :][:60]!r}; {_SYNTAX}.")
    return cleaned, merge(*found)


def parse_toggle(text: str) -> dict[str, float]:
    """Read ``NAME`` (erased at 1) or ``NAME:STRENGTH``.

    Raises:
        SepMEError: no name, more than one strength, or one that is no number.
    """
    return _toggle("erase", text, f"entry {text[:60]!r}")


def _toggle(kind: str, body: str, what: str) -> dict[str, float]:
    name, *strengths = (part.strip() for part in body.split(":"))
    if not name:
        raise SepMEError(f"The {what} names no concept; {_SYNTAX}.")
    if re.search(r"[<>]", body) or len(strengths) > 1:
        raise SepMEError(f"The {what} has too many parts; it takes a name and one strength, like star:0.7.")
    if kind == "keep" and strengths:
        raise SepMEError(f"The {what} has a strength; <keep:name> takes none, use <erase:name:strength>.")
    return {name: 0.0 if kind == "keep" else _strength(strengths[0] if strengths else 1.0, name)}


def _without_separator(before: str, after: str, tag: str) -> tuple[str, str]:
    """What stands before and after a tag, less the separator that was put in for it.

    Raises:
        SepMEError: the tag is one arm of prompt editing, ``[<tag>:…:0.5]`` or ``[…|<tag>]``.
    """
    while (opening := re.search(r"(?<!\\)[(\[]\s*\Z", before)) and (closing := _EMPTY_EMPHASIS.match(after)):
        if "([".index(opening[0][0]) != ")]".index(closing[0][-1]):
            break
        before, after = before[: opening.start()], after[closing.end() :]
    if re.search(r"\[(?:[^\[\]]*[:|])?\s*\Z", before) and re.match(r"\s*[:|\]]", after):
        raise SepMEError(f"The tag {tag[:60]!r} is scheduled like words, but acts in all steps; take it out of the [ ].")
    left, right = _SEPARATOR_BEFORE.search(before), _SEPARATOR_AFTER.match(after)
    first, last = (m[0] if m else "" for m in (left, right))
    if not after.strip():
        drop_left = True
    elif not before.strip() or before[-1] in "([{|:\n":  # nothing stands before it, at least on its line
        drop_left = False
    elif after[0] in ")]}|:.;!?":
        drop_left = True
    elif "," in first and "," in last:
        drop_left = (last not in (",", ", ") and first in (",", ", ")) or (first, last) == (",", ", ")
    elif first[-1:].isspace() and after.startswith(","):
        first, drop_left = first[-1], True
    elif first[-1:].isspace() and last[:1].isspace():
        first, last = first[-1], last[0]
        drop_left = last != " " and first == " "
    else:
        return before, after
    return (before[: len(before) - len(first)], after) if drop_left else (before, after[len(last) :])


def parse_json(text: str) -> dict[str, float]:
    """Read toggles from a JSON object, ``{"van gogh": 1.0, "picasso": 0.0}``; empty text means none."""
    if not text.strip():
        return {}
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SepMEError):
            raise
        raise SepMEError('The toggles are not JSON; write them like {"van gogh": 1.0, "picasso": 0.0}.') from None
    if not isinstance(data, dict):
        raise SepMEError('The toggles must be one JSON object like {"van gogh": 1.0}.')
    return {name: _strength(value, name) for name, value in data.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({normalised(name) for name, _ in pairs}) < len(pairs):
        raise SepMEError("The toggles name a concept twice; name each once.")
    return dict(pairs)


def _strength(value: Any, name: str) -> float:
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > 100:
        raise SepMEError(
            f"The strength {str(value)[:20]!r} of {name[:40]!r} is no number between -100 and 100; use 0 (preserved) to 1 (erased)."
        )
    return number


def merge(*layers: Toggles) -> dict[str, float]:
    """Join toggles; later ones win (node, conditioning, prompt tags, in that order). Names compare without case."""
    merged: dict[str, tuple[str, float]] = {}
    for layer in layers:
        for name, strength in layer.items():
            merged.pop(normalised(name), None)  # the last comes last: a label or a file may mean the same concept as a name
            merged[normalised(name)] = (name, strength)
    return dict(merged.values())


def strengths(rows: Sequence[Toggles], concepts: Sequence[str | ConceptDelta], default: float = 1.0) -> Tensor:
    """Strengths ``(rows, concepts)`` float32 of each row's toggles; concepts that a row does not name get ``default``.

    Args:
        rows: strengths by whatever :func:`~sepme.delta.library.resolve` understands.
        concepts: the deltas, or names alone.

    Raises:
        SepMEError: a toggle names a concept that is not among them, or could mean several.
    """
    table = torch.full((len(rows), len(concepts)), default)
    found: dict[str, int] = {}
    for row, toggles in enumerate(rows):
        for name, strength in toggles.items():
            if name not in found:
                found[name] = _index(name, concepts)
            table[row, found[name]] = strength
    return table


def _index(name: str, concepts: Sequence[str | ConceptDelta]) -> int:
    places = resolve(name, concepts)
    if len(places) == 1:
        return places[0]
    loaded = ", ".join(c if isinstance(c, str) else c.concept.name for c in concepts) or "none"
    if places:
        raise SepMEError(f"{name[:60]!r} means several of the loaded concepts ({loaded}); write more of it.")
    raise SepMEError(f"There is no concept {name[:60]!r} here; loaded concepts: {loaded}.")
