"""Concepts and concept books: what is to be erased, and what must not change."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import SepMEError

TEMPLATES = ("{}", "a {}", "a photo of {}", "a picture of {}", "a painting of {}", "{} style", "in the style of {}")
MAX_NAME, MAX_PROMPT, MAX_BOOK_BYTES = 128, 2000, 1 << 20
MAX_FILE_NAME = 190  # bytes; file systems take 255, endings and numbers included
_DEVICES = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)


def file_name(concept: str) -> str:
    """File name of a concept's delta: the words of its name joined by '-'.

    A name that is more than words between spaces or hyphens (``C++``), too long for a file system or reserved by Windows gets a digest
    behind it: one concept always has the same file name, and two have the same only if they differ in hyphens alone.
    """
    name = normalised(concept)
    plain = "-".join(re.findall(r"\w+", name))
    short = plain.encode()[:MAX_FILE_NAME].decode(errors="ignore") or "concept"
    if plain == short == name.replace(" ", "-") and not reserved(plain):
        return plain
    return f"{short}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def reserved(name: str) -> bool:
    """Whether Windows cannot hold a file of this name: a device's name before the first dot, or a dot or space at the end."""
    return _DEVICES.fullmatch(name.split(".")[0].strip()) is not None or name != name.rstrip(". ")


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
    """Case-folded, composed text (NFC) with single spaces, for comparing names and prompts."""
    return unicodedata.normalize("NFC", " ".join(unicodedata.normalize("NFC", text).casefold().split()))


def split_names(text: str, separators: str = ",\n") -> list[str]:
    """Names of a list that somebody typed, without empty ones; a name that holds a separator stands in double quotes, its own doubled.

    Raises:
        SepMEError: a quote is not closed.
    """
    between = f"[{re.escape(separators)}]"
    item = re.compile(rf'\s*(?:"((?:[^"]|"")*)"|“([^“”]*)”)\s*(?:{between}|\Z)|(.*?)(?:{between}|\Z)', re.DOTALL)
    names, place = [], 0
    while place < len(text):
        found = item.match(text, place)
        assert found is not None  # the last alternative takes anything
        if found[3] is not None and re.match(r'\s*["“][^"”]*\Z', text[place:]):
            raise SepMEError(f"The quote at {text[place:].strip()[:40]!r} is not closed; put one quote before and one behind the name.")
        quoted, curly, plain = found.groups()
        names.append((quoted.replace('""', '"') if quoted is not None else curly or plain or "").strip())
        place = found.end()
    return [name for name in names if name]


def mentions(text: str, name: str) -> bool:
    """Whether ``name`` stands in ``text`` as whole words."""
    text, name = normalised(text), normalised(name)
    return name in text and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


@dataclass(frozen=True)
class ConceptBook:
    """Concepts in order of arrival, and prompts that must not change at all: a list, and a text file of any length, one per line.

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
                        "it cannot be erased and preserved at once, so remove it from one of them."
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
            raise SepMEError(f"{source} has no list of concepts; write 'concepts:' and under it one name per line, each behind '- '.")
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
            def construct_mapping(self, node: Any, deep: bool = False) -> Any:
                _once([(self.construct_object(key, deep=True), None) for key, _ in node.value], source)
                return super().construct_mapping(node, deep)

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
            return ConceptBook.parse(json.loads(text.lstrip("\ufeff"), object_pairs_hook=lambda pairs: _once(pairs, source)), source)
        except SepMEError:
            raise
        except (ValueError, RecursionError):  # no JSON, so YAML, which reads most JSON too, but neither tabs nor escaped emoji
            pass
        try:
            data = yaml.load(text, Loader=Loader)
        except SepMEError:
            raise
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
            with open(path, encoding="utf-8-sig") as file:
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


def _once(pairs: list[tuple[Any, Any]], source: str) -> dict[Any, Any]:
    """The pairs of a mapping, unless a key is written twice: the first would be lost."""
    seen: dict[Any, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise SepMEError(f"{source} has {str(key)[:40]!r} twice in one place; write it once, with everything under it.")
        seen[key] = value
    return seen


def _known_keys(data: Mapping[str, Any], known: set[str], source: str) -> None:
    for key in data:
        if key not in known:
            raise SepMEError(f"{source} has an unknown key {str(key)[:40]!r}; known keys here: {', '.join(sorted(known))}.")


def _texts(value: Any, what: str) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise SepMEError(f"{what[0].upper() + what[1:]} must be a list of texts; put each on its own line behind '- '.")
    return tuple(value)
