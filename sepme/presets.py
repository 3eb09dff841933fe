"""Presets: lists of concepts that many people take out, each a YAML file of the repository."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .concepts import ConceptBook
from .errors import SepMEError

FOLDER = Path(__file__).parent / "data" / "presets"


@dataclass(frozen=True)
class Preset:
    """A list to choose from.

    Attributes:
        key: its file's name without the ending.
        title: what lists call it.
        whole: its concepts belong together and are added at once; otherwise they are examples to choose among.
    """

    key: str
    title: str
    whole: bool
    book: ConceptBook

    @staticmethod
    def load(path: Path) -> Preset:
        """A preset file: a concept book whose first comment lines are the title and ``whole`` or ``choose``.

        Raises:
            SepMEError: it is no such file.
        """
        lines = path.read_text(encoding="utf-8").splitlines()[:2]
        if len(lines) < 2 or not all(line.startswith("# ") for line in lines) or lines[1] not in ("# whole", "# choose"):
            raise SepMEError(f"{path} does not begin with '# title' and '# whole' or '# choose'; write these two lines first.")
        return Preset(path.stem, lines[0][2:], lines[1] == "# whole", ConceptBook.load(path))


@cache
def presets() -> tuple[Preset, ...]:
    """The shipped ones, by file name."""
    return tuple(Preset.load(path) for path in sorted(FOLDER.glob("*.yaml")))
