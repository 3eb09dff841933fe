"""What the panel says, and what a batch of prompts makes of it. Plain data: no host, no widgets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...sepme.apply.composition import Composition
from ...sepme.apply.projector import BACKENDS
from ...sepme.apply.toggles import merge, parse_json, parse_tags, strengths
from ...sepme.concepts import normalised, split_names
from ...sepme.errors import SepMEError

Tags = dict[str, float]
_ANY_TAG = re.compile(r"<(?:erase|keep)[^\w>][^>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """The panel's controls, in the order of the API's positional arguments.

    Attributes:
        enabled: whether the panel's concepts are on; prompt tags work either way.
        concepts: names, labels, files or hashes of deltas.
        strengths: by the same, 1 where not given; ``overall`` goes before them.
        named: concepts that are no files: erased by their names alone.
    """

    enabled: bool = False
    concepts: tuple[str, ...] = ()
    strengths: Mapping[str, float] = field(default_factory=dict)
    gate: bool = True
    backend: str = "auto"
    named: tuple[str, ...] = ()
    overall: float | None = None

    @staticmethod
    def parse(*args: Any) -> Settings:
        """Read the controls' values; missing ones at the end take their defaults.

        Raises:
            SepMEError: a value that no control would give.
        """
        given = dict(zip(("enabled", "concepts", "strengths", "gate", "backend", "named"), args, strict=False))
        enabled, gate = _switch(given.get("enabled"), False, "first"), _switch(given.get("gate"), True, "fourth")
        concepts, table, backend = given.get("concepts") or (), given.get("strengths") or "", given.get("backend") or "auto"
        if isinstance(concepts, str):
            concepts = [concepts]
        if not isinstance(concepts, (list, tuple)) or not all(isinstance(c, str) for c in concepts):
            raise SepMEError("SepME's second argument is a list of concepts, like ['van gogh'].")
        table = parse_json(table if isinstance(table, str) else json.dumps(table, default=str))
        if backend not in BACKENDS:
            raise SepMEError(f"SepME has no backend {str(backend)[:40]!r}; choose one of {', '.join(BACKENDS)}.")
        named = given.get("named") or ""
        if not isinstance(named, str):
            raise SepMEError("SepME's sixth argument is names with commas between, like 'van gogh, picasso'.")
        return Settings(enabled, tuple(dict.fromkeys(concepts)), table, gate, backend, tuple(dict.fromkeys(split_names(named))))

    def strength(self, concept: str) -> float:
        """Of a concept chosen in the panel; strengths are by concept here."""
        table = {normalised(k): v for k, v in self.strengths.items()}
        return self.overall if self.overall is not None else table.get(normalised(concept), 1.0)


def _switch(value: Any, default: bool, place: str) -> bool:
    if value is not None and value not in (0, 1):
        raise SepMEError(f"SepME's {place} argument is true or false, not {str(value)[:40]!r}.")
    return default if value is None else bool(value)


def take_tags(prompts: Sequence[str]) -> tuple[list[str], list[Tags], list[str]]:
    """Prompts without tags, the tags of each, and a sentence for each tag that cannot be read: its prompt is left without tags."""
    texts, tags, wrong = [], [], []
    for prompt in prompts:
        try:
            text, found = parse_tags(prompt)
        except SepMEError as error:
            text, found = _ANY_TAG.sub("", prompt), {}
            wrong.append(str(error))
        texts.append(text)
        tags.append(found)
    return texts, tags, list(dict.fromkeys(wrong))


@dataclass(frozen=True)
class Tables:
    """Strengths of a batch of images.

    Attributes:
        composition: all deltas that any row may need.
        base: ``(N,)`` what the panel says.
        positive, negative: ``(images, N)`` of the prompts and negative prompts.
    """

    composition: Composition
    base: Tensor
    positive: Tensor
    negative: Tensor

    @staticmethod
    def make(composition: Composition, panel: Mapping[str, float], positive: Sequence[Tags], negative: Sequence[Tags]) -> Tables:
        """Every prompt's own tags beat the panel; deltas that the panel does not name are there for tags alone."""
        known = {normalised(n) for n in composition.names}

        def table(rows: Sequence[Tags]) -> Tensor:
            return strengths([merge(panel, {n: s for n, s in r.items() if normalised(n) in known}) for r in rows], composition.names, 0.0)

        return Tables(composition, table([{}])[0], table(positive), table(negative))

    @property
    def uniform(self) -> bool:
        """Whether every prompt has what the panel says."""
        return bool((self.positive == self.base).all() and (self.negative == self.base).all())

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done: no row of any image has a strength."""
        return not any(t.any() for t in (self.base, self.positive, self.negative))
