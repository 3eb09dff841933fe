"""Axes of the X/Y/Z plot: "SepME strength" and "SepME concepts"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...sepme.concepts import split_names
from ...sepme.delta.library import Entry
from . import host
from .files import find, labels

JOINT = "+"  # commas separate an axis's values
NONE = ("none", "nothing")  # the first that is no concept's name


def _strength(p: Any, value: float, values: list[float]) -> None:
    p.sepme_strength = value


def _concepts(p: Any, value: str, values: list[str]) -> None:
    p.sepme_concepts = concepts_of(value, host.library.entries())


def concepts_of(value: str, entries: Sequence[Entry]) -> list[str]:
    """The concepts of one value of the axis: one, or several joined by ``+``.

    A name that has a ``+`` in it is known by its file, or stands in quotes.
    """
    if find(value, entries):
        return [value.strip()]
    if '"' in value:
        return split_names(value, JOINT)
    names, parts = [], value.split(JOINT)
    while parts:
        lengths = (n for n in range(len(parts), 0, -1) if find(JOINT.join(parts[:n]), entries))
        length = next(lengths, 0)
        if not length:  # some name is unknown: what is surely a joint
            return [name.strip() for name in re.split(rf"\s\{JOINT}\s", value) if name.strip()]
        names.append(JOINT.join(parts[:length]).strip())
        del parts[:length]
    return names


def means_none(concepts: Sequence[str], entries: Sequence[Entry]) -> bool:
    """Whether a value of the axis means that nothing is to be erased."""
    return not concepts or (len(concepts) == 1 and concepts[0] in NONE and not find(concepts[0], entries))


def _choices() -> list[str]:
    entries = host.library.entries()
    return [*[word for word in NONE if not find(word, entries)][:1], *labels(entries)]


def add_axes() -> None:
    """Add the axes to the host's plot script, once; it may have been left out or renamed."""
    for module in host.script_modules():
        axes = getattr(module, "axis_options", None)
        option = getattr(module, "AxisOption", None)
        if option is None or not isinstance(axes, list) or any(a.label == "SepME strength" for a in axes):
            continue
        axes.append(option("SepME strength", float, _strength))
        axes.append(option("SepME concepts", str, _concepts, choices=_choices, prepare=split_names))
