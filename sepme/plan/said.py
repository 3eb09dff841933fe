"""What somebody says of words near a concept, which knows better than anything that can be found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..concepts import normalised
from ..errors import SepMEError
from ..files import text

LISTS = ("stays", "same", "free")


@dataclass(frozen=True)
class Said:
    """Words in small letters, each in one of the lists.

    Attributes:
        stays: must not change.
        same: mean the concept and change with it.
        free: may change or not.
    """

    stays: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    free: tuple[str, ...] = ()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Said:
        """Read it from a file or a row.

        Raises:
            TypeError, ValueError: something else than lists of texts.
        """
        lists = []
        for name in LISTS:
            given = data.get(name) or []
            if not isinstance(given, list):
                raise TypeError(f"{name} is no list")
            lists.append(tuple(dict.fromkeys(word for one in given if (word := normalised(text(one))))))
        return Said(*lists)

    def to_json(self) -> dict[str, list[str]]:
        """The lists that are not empty."""
        return {name: list(getattr(self, name)) for name in LISTS if getattr(self, name)}


def check_said(said: Mapping[str, Said]) -> None:
    """Refuse contradictions.

    Args:
        said: by concept.

    Raises:
        SepMEError: a word is in two lists, of one concept or of two.
    """
    seen: dict[str, str] = {}
    for name in LISTS:
        for word in {w for s in said.values() for w in getattr(s, name)}:
            if seen.setdefault(word, name) != name:
                raise SepMEError(
                    f"The word {word!r} is in two lists, of words that must not change, that change with a concept, or that may change; "
                    "take it out of one."
                )
