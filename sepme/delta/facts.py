"""What a delta's header says of how it was made and what was measured, as types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..concepts import Concept
from ..files import number, text
from ..model.encoder_fingerprint import EncoderFingerprint
from ..plan.gate import Certificate
from ..plan.said import Said
from .format import plain_json

DAMAGE = (KeyError, ValueError, TypeError, AttributeError, RecursionError)  # what reading a damaged part raises


@dataclass(frozen=True)
class Preserve:
    """Prompts that must not change: of a short list the prompts, of any its length and SHA-256."""

    prompts: tuple[str, ...] = ()
    count: int = 0
    sha256: str = ""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Preserve:
        """Read it from a header; what is missing is empty."""
        prompts = tuple(map(text, data.get("prompts", ())))
        return Preserve(prompts, number(data.get("count", 0)), text(data.get("sha256") or ""))


@dataclass(frozen=True)
class Recipe:
    """How to make a delta again, as it stands in the file: the settings of training and planning, the concept book."""

    data: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """Read it from a header."""
        for key in ("train", "plan"):
            data.get(key, {}).items()
        return Recipe(data)

    @property
    def train(self) -> Mapping[str, Any]:
        """Fields of the training options."""
        return self.data.get("train", {})

    @property
    def plan(self) -> Mapping[str, Any]:
        """Fields of the plan options."""
        return self.data.get("plan", {})

    @property
    def settings(self) -> dict[str, int | float | str]:
        """Plain values of both; of files from before nearby words, that there were none."""
        found = {"nearby": 0} | {k: self.plan[k] for k in ("max_rank", "nearby") if k in self.plan} | dict(self.train)
        return {k: v for k, v in found.items() if isinstance(v, (int, float, str))}

    @property
    def book(self) -> Any:
        """The concept book."""
        return self.data.get("book")


@dataclass(frozen=True)
class ObjectiveUsed:
    """Name of the objective that was trained, and how many steps it took."""

    name: str = "?"
    steps: int = 0

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ObjectiveUsed:
        """Read it from a header."""
        return ObjectiveUsed(text(data.get("name", "?")), number(data.get("steps", 0)))


@dataclass(frozen=True)
class NearbyWords:
    """Words near a concept that were found: those that it leaves alone, the nearest first; and those that are taken to mean the same.

    Attributes:
        said: what somebody said of such words.
    """

    near: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    said: Said = field(default_factory=Said)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> NearbyWords:
        """Read it from a header; what is missing is empty."""
        near, synonyms = (tuple(map(text, data.get(name, ()))) for name in ("near", "synonyms"))
        return NearbyWords(near, synonyms, Said.from_json(data.get("said", {})))


@dataclass(frozen=True)
class Facts:
    """Everything that is known of a delta beside its tensors, concept and gate.

    Attributes:
        certificate: what was measured; its figures are NaN where the file does not say them.
        known: the concepts that it leaves alone.
        preserve: the prompts that it leaves alone.
        losses: of every step.
        kv_fingerprint: of the checkpoint that it was made on, empty if unknown.
        clip_skip: how many of CLIP's last layers were skipped.
        text_encoder: the encoder that it was made with, None if unknown.
        nearby: words near it.
    """

    certificate: Certificate = field(default_factory=lambda: Certificate.from_json({}))
    known: tuple[Concept, ...] = ()
    preserve: Preserve = Preserve()
    recipe: Recipe = Recipe()
    objective: ObjectiveUsed = ObjectiveUsed()
    losses: tuple[float, ...] = ()
    kv_fingerprint: str = ""
    clip_skip: int = 0
    text_encoder: EncoderFingerprint | None = None
    nearby: NearbyWords = field(default_factory=NearbyWords)

    @staticmethod
    def from_info(info: Mapping[str, Any]) -> Facts:
        """The facts that stand in ``ConceptDelta.info``.

        Raises:
            One of ``DAMAGE``: something is of another type than it should be.
        """
        return Facts(**{name: read(info[name]) for name, read in _READERS.items() if name in info})

    @staticmethod
    def from_header(metadata: Mapping[str, str]) -> Facts:
        """The facts of a file that is not loaded; damaged ones are left out."""
        found: dict[str, Any] = {}
        for name, read in _READERS.items():
            with suppress(*DAMAGE):
                found[name] = read(plain_json(metadata[name]))
        return Facts(**found)


def _known(data: Sequence[Mapping[str, Any]]) -> tuple[Concept, ...]:
    return tuple(Concept(entry["name"], tuple(entry["prompts"])) for entry in data)


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "certificate": Certificate.from_json,
    "known": _known,
    "preserve": Preserve.from_json,
    "recipe": Recipe.from_json,
    "objective": ObjectiveUsed.from_json,
    "losses": lambda data: tuple(map(number, data)),
    "kv_fingerprint": text,
    "clip_skip": number,
    "text_encoder": EncoderFingerprint.from_json,
    "nearby": NearbyWords.from_json,
}
