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
from ..errors import SepMEError

Toggles = Mapping[str, float]
_TAG = re.compile(r"<(erase|keep):([^<>:]*)(?::([^<>:]*))?>", re.IGNORECASE)


def parse_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """Take ``<erase:name>``, ``<erase:name:0.7>`` and ``<keep:name>`` out of a prompt.

    Returns:
        the prompt without tags (spaces closed up) and strengths by name; the last tag of a name wins.
    """
    found: list[dict[str, float]] = []

    def take(match: re.Match[str]) -> str:
        kind, name, strength, shown = match[1].lower(), match[2].strip(), match[3], match[0][:60]
        if not name:
            raise SepMEError(f"The tag {shown!r} names no concept; write <erase:name>.")
        if kind == "keep" and strength is not None:
            raise SepMEError(f"The tag {shown!r} has a strength; <keep:name> takes none, use <erase:name:strength>.")
        found.append({name: 0.0 if kind == "keep" else _strength(strength if strength is not None else 1.0, name)})
        return " "

    cleaned = _TAG.sub(take, prompt)
    if cleaned != prompt:
        cleaned = re.sub(r"\s*,(\s*,)+", ",", re.sub(r"\s+", " ", cleaned)).strip(" ,").replace(" ,", ",")
    return cleaned, merge(*found)


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
            f"The strength {str(value)[:20]!r} of {name[:40]!r} is no number between -100 and 100; use 0 (kept) to 1 (erased)."
        )
    return number


def merge(*layers: Toggles) -> dict[str, float]:
    """Join toggles; later ones win (node, conditioning, prompt tags, in that order). Names compare without case."""
    merged: dict[str, tuple[str, float]] = {}
    for layer in layers:
        for name, strength in layer.items():
            merged[normalised(name)] = (name, strength)
    return dict(merged.values())


def strengths(rows: Sequence[Toggles], names: Sequence[str], default: float = 1.0) -> Tensor:
    """Strengths ``(rows, concepts)`` float32 of each row's toggles; concepts that a row does not name get ``default``.

    Raises:
        SepMEError: a toggle names a concept that is not among ``names``.
    """
    index = {normalised(name): i for i, name in enumerate(names)}
    table = torch.full((len(rows), len(names)), default)
    for row, toggles in enumerate(rows):
        for name, strength in toggles.items():
            if normalised(name) not in index:
                raise SepMEError(f"There is no concept {name[:60]!r} here; loaded concepts: {', '.join(names) or 'none'}.")
            table[row, index[normalised(name)]] = strength
    return table
