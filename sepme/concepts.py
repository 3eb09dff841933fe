"""Concepts and concept books: what is to be erased, and what must not change."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import SepMEError

TEMPLATES = ("{}", "a {}", "a photo of {}", "a picture of {}", "a painting of {}", "{} style", "in the style of {}")
MAX_NAME, MAX_PROMPT, MAX_BOOK_BYTES = 128, 2000, 1 << 20


def file_name(concept: str) -> str:
    """File name of a concept's delta: word characters of its name, joined by '-'."""
    name = "-".join(re.findall(r"\w+", concept.casefold())) or "concept"
    return name.encode()[:200].decode(errors="ignore")  # file systems take 255 bytes, endings included


@dataclass(frozen=True)
class Concept:
    """A concept: its name, the prompts that mean it, and the anchor that takes its place (empty prompt by default)."""

    name: str
    prompts: tuple[str, ...] = ()
    anchor: str = ""

    def __post_init__(self) -> None:
        name = self.name.strip() if isinstance(self.name, str) else ""
        if not name:
            raise SepMEError("A concept has an empty name; give every concept a name.")
        if len(name) > MAX_NAME or re.search(r"[<>:\x00-\x1f]", name):
            raise SepMEError(f"The concept name {name[:40]!r} is too long or has one of the characters < > : in it; choose a plain name.")
        prompts = tuple(p.strip() for p in self.prompts) or tuple(t.format(name) for t in TEMPLATES)
        for prompt in (name, *prompts, self.anchor):
            if re.search("[\ud800-\udfff]", prompt):
                raise SepMEError(f"Concept {name[:40]!r} holds half a character, which is not valid text; type it again.")
            if len(prompt) > MAX_PROMPT:
                raise SepMEError(f"A prompt of concept {name!r} has {len(prompt)} characters; keep it under {MAX_PROMPT}.")
        if not all(prompts):
            raise SepMEError(f"Concept {name!r} has an empty prompt; the empty prompt can never be erased, so remove it.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(prompts)))
        object.__setattr__(self, "anchor", self.anchor.strip())


@lru_cache(maxsize=1 << 14)  # books of a thousand names compare every pair
def normalised(text: str) -> str:
    """Case-folded text with single spaces, for comparing names and prompts."""
    return " ".join(text.casefold().split())


def mentions(text: str, name: str) -> bool:
    """Whether ``name`` stands in ``text`` as whole words."""
    text, name = normalised(text), normalised(name)
    return name in text and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


@dataclass(frozen=True)
class ConceptBook:
    """Concepts in order of arrival, and prompts that must not change at all: a list, and a text file of any length, one a line.

    Raises:
        SepMEError: duplicate names, or a concept with a prompt that is also preserved or another concept's.
    """

    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...] = ()
    preserve_file: str = ""

    def __post_init__(self) -> None:
        for prompt in self.preserve:
            if re.search("[\ud800-\udfff]", prompt) or len(prompt) > MAX_PROMPT:
                raise SepMEError(
                    f"The preserved prompt {prompt[:40]!a} holds half a character or is longer than {MAX_PROMPT}; type it again."
                )
        owner: dict[str, str] = {normalised(p): "the preserve list" for p in self.preserve}
        names: set[str] = set()
        for concept in self.concepts:
            if normalised(concept.name) in names:
                raise SepMEError(f"The concept {concept.name!r} is listed twice; every name may appear once.")
            names.add(normalised(concept.name))
            for prompt in concept.prompts:
                other = owner.setdefault(normalised(prompt), f"concept {concept.name!r}")
                if other != f"concept {concept.name!r}":
                    raise SepMEError(
                        f"The prompt {prompt!r} of concept {concept.name!r} also belongs to {other}; "
                        "it cannot be erased and kept at once, so remove it from one of them."
                    )

    def __getitem__(self, name: str) -> Concept:
        for concept in self.concepts:
            if normalised(concept.name) == normalised(name):
                return concept
        known = ", ".join(c.name for c in self.concepts)
        raise SepMEError(f"There is no concept {name!r} here; known concepts: {known}.")

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs (inner, outer) of names of which one's words stand in the other ("painting", "oil painting")."""
        return [
            (a.name, b.name)
            for a in self.concepts
            for b in self.concepts
            if a is not b and mentions(b.name, a.name)
        ]  # fmt: skip

    @staticmethod
    def parse(data: Any, source: str = "the concept book") -> ConceptBook:
        """Build a book from parsed YAML or JSON.

        ``data`` is a list of concepts, or ``{concepts: [...], preserve: [...], preserve_file: path}``; a concept is
        a name or ``{name, prompts, anchor}``.
        """
        if isinstance(data, list):
            data = {"concepts": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("concepts"), list) or not data["concepts"]:
            raise SepMEError(f"{source} has no list of concepts; write 'concepts:' and under it one name a line, each behind '- '.")
        _known_keys(data, {"concepts", "preserve", "preserve_file"}, source)
        concepts = []
        for entry in data["concepts"]:
            if isinstance(entry, Mapping):
                _known_keys(entry, {"name", "prompts", "anchor"}, source)
            else:
                entry = {"name": entry}
            name, anchor = entry.get("name"), entry.get("anchor") or ""
            if not isinstance(name, str) or not isinstance(anchor, str):
                raise SepMEError(f"{source} has a concept whose name or anchor is no text ({str(name)[:40]!r}); put it in quotes.")
            concepts.append(Concept(name, _texts(entry.get("prompts"), f"the prompts of {name!r} in {source}"), anchor))
        preserve_file = data.get("preserve_file") or ""
        if not isinstance(preserve_file, str):
            raise SepMEError(f"The preserve_file of {source} must be one path; put it in quotes.")
        return ConceptBook(tuple(concepts), _texts(data.get("preserve"), f"the preserve list of {source}"), preserve_file)

    @staticmethod
    def loads(text: str, source: str = "the concept book") -> ConceptBook:
        """Parse YAML or JSON text (plain data only, no YAML aliases)."""
        import yaml

        class Loader(yaml.SafeLoader):
            def compose_node(self, parent: Any, index: Any) -> Any:
                if self.check_event(yaml.events.AliasEvent):
                    raise yaml.YAMLError("aliases are not allowed")
                return super().compose_node(parent, index)

            def construct_scalar(self, node: Any) -> Any:
                if node.tag != self.DEFAULT_SCALAR_TAG and len(node.value) > 100:  # numbers that take minutes to convert
                    raise yaml.YAMLError("a long value that is no text")
                return super().construct_scalar(node)

        if len(text) > MAX_BOOK_BYTES:
            raise SepMEError(f"{source} is larger than {MAX_BOOK_BYTES >> 20} MB; concept books are short lists of names.")
        try:
            data = yaml.load(text, Loader=Loader)
        except (
            yaml.YAMLError,
            RecursionError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            TypeError,
        ) as error:  # wrong !!tags
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            raise SepMEError(f"{source} is not readable YAML or JSON{where}; check its indentation and quotes.") from None
        return ConceptBook.parse(data, source)

    @staticmethod
    def load(path: str | Path) -> ConceptBook:
        """Read a ``.yaml`` or ``.json`` book; its preserve file is looked for beside it."""
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(MAX_BOOK_BYTES + 1)
        except UnicodeDecodeError:
            raise SepMEError(f"{path} is not a text file; a concept book is YAML or JSON in UTF-8.") from None
        except OSError as error:
            raise SepMEError(f"The concept book {path} cannot be read ({error.strerror}); check the path.") from None
        book = ConceptBook.loads(text, str(path))
        return replace(book, preserve_file=str(Path(path).parent / book.preserve_file)) if book.preserve_file else book

    def dumps(self) -> str:
        """The book as JSON."""
        concepts = [{"name": c.name, "prompts": list(c.prompts), "anchor": c.anchor} for c in self.concepts]
        file = {"preserve_file": self.preserve_file} if self.preserve_file else {}
        return json.dumps({"concepts": concepts, "preserve": list(self.preserve)} | file, indent=2)


def _known_keys(data: Mapping[str, Any], known: set[str], source: str) -> None:
    for key in data:
        if key not in known:
            raise SepMEError(f"{source} has an unknown key {str(key)[:40]!r}; known keys here: {', '.join(sorted(known))}.")


def _texts(value: Any, what: str) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise SepMEError(f"{what[0].upper() + what[1:]} must be a list of texts; put each on its own line behind '- '.")
    return tuple(value)
