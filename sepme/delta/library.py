"""The delta files in a host's model folders: listed, found again when renamed, read from text that travels inside a workflow."""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from ..concepts import file_name, normalised, reserved
from ..errors import SepMEError
from .concept_delta import ConceptDelta
from .format import read_header

MAX_EMBEDDED = 4 << 20  # bytes of a delta that travels inside a workflow
MAX_NAME = 220  # bytes of a name; file systems take 255, endings included


@dataclass(frozen=True)
class Entry:
    """What a delta file says of itself.

    Attributes:
        name: path below its folder, with forward slashes.
        path: of the file.
        bytes: its size.
    """

    name: str
    path: Path
    bytes: int
    concept: str
    content_hash: str
    architecture: str
    kv_fingerprint: str

    @property
    def same(self) -> tuple[str, str]:
        """Equal for files that are copies; one content may have been given to several concepts."""
        return self.content_hash, normalised(self.concept)


class DeltaLibrary:
    """The ``.safetensors`` files below some folders. Headers are read once, until a file's time or size changes.

    Args:
        folders: called for the folders whenever they are needed; those that do not exist are passed over.
    """

    def __init__(self, folders: Callable[[], Sequence[str | Path]]) -> None:
        self._folders = folders
        self._known: dict[Path, tuple[tuple[int, int], Entry | None]] = {}

    @property
    def folder(self) -> Path:
        """Where new files go."""
        return Path(self._folders()[0])

    def entries(self) -> list[Entry]:
        """All deltas, by name; what is no delta, or cannot be read, is left out. Of equal names the first folder's counts."""
        found: dict[str, Entry] = {}
        for entry in self.copies():
            found.setdefault(entry.name, entry)
        return sorted(found.values(), key=lambda e: e.name)

    def unique(self) -> list[Entry]:
        """The same with files of one content and concept as one, by its first name."""
        return sorted({e.same: e for e in reversed(self.entries())}.values(), key=lambda e: e.name)

    def copies(self) -> list[Entry]:
        """Every file that is a delta, folder by folder: also those that have a namesake in an earlier folder."""
        found = [(folder, path) for folder in map(Path, self._folders()) for path in _delta_files(folder)]
        present = {path for _, path in found}
        self._known = {path: known for path, known in self._known.items() if path in present}
        return [entry for folder, path in found if (entry := self._entry(folder, path)) is not None]

    def _entry(self, folder: Path, path: Path) -> Entry | None:
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):  # reading a pipe would wait forever
                return None
            state = (stat.st_mtime_ns, stat.st_size)
            if path not in self._known or self._known[path][0] != state:
                self._known[path] = (state, _read(folder, path, stat.st_size))
            return self._known[path][1]
        except OSError:  # removed meanwhile, or not ours to read
            return None

    def find(self, name: str, content_hash: str = "") -> list[Path]:
        """Files to try, best first: of this name, with either kind of slash; with a hash only those that claim it, wherever they are."""
        plain = name.replace("\\", "/")
        entries = [e for e in self.copies() if (e.content_hash == content_hash if content_hash else e.name == plain)]
        return [e.path for e in sorted(entries, key=lambda e: e.name != plain)]

    def load(self, name: str, content_hash: str = "") -> ConceptDelta | None:
        """The delta of :meth:`find`; None when there is none.

        Raises:
            SepMEError: there is one, but it is damaged, and no other.
        """
        failed: SepMEError | None = None
        for path in self.find(name, content_hash):
            try:
                return ConceptDelta.load(path)
            except SepMEError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return None

    def save(self, delta: ConceptDelta, prefix: str = "") -> Path:
        """Write a delta as ``<prefix><concept>.safetensors``; a file with the same content stays, whatever picture it has, and one with
        other content is never replaced.

        Raises:
            SepMEError: the prefix leads out of the folder, or the file cannot be written.
        """
        for path in self.numbered(f"{prefix}{file_name(delta.concept.name)}"):
            if not path.exists():
                return delta.save(path)
            if _holds(path, delta):
                break
        return path

    def numbered(self, name: str) -> Iterator[Path]:
        """Paths for a new file of this name, best first: itself, ``-2``, ``-3`` ...

        Raises:
            SepMEError: see :meth:`place`; or ten thousand were not enough.
        """
        stem = self.place(name)
        for number in range(1, 10_000):
            yield stem.with_name(f"{stem.name}{'' if number == 1 else f'-{number}'}.safetensors")
        raise SepMEError(f"{stem.parent} holds ten thousand files of this name; choose another prefix.")

    def place(self, name: str) -> Path:
        """The path of a new file of this name in the first folder.

        Raises:
            SepMEError: it lies outside, or is too long.
        """
        parts = PurePosixPath(name.replace("\\", "/"))
        if bad := [part for part in parts.parts if re.search(r'[<>:"|?*\x00-\x1f]', part) or (part not in ("/", "..") and reserved(part))]:
            raise SepMEError(
                f'No file on Windows can be called {bad[0][:60]!r}; give a name without < > : " | ? *, of no device (con, nul), that ends '
                "in no dot or space."
            )
        if any(len(part.encode(errors="replace")) > MAX_NAME for part in parts.parts):
            raise SepMEError(f"The file name {name[:60]!r}... has more than {MAX_NAME} bytes; give a shorter one.")
        path = self.folder / parts
        strange = parts.is_absolute() or ".." in parts.parts
        if strange or not path.resolve().is_relative_to(self.folder.resolve()):  # a linked subfolder
            raise SepMEError(f"The file name {name[:60]!r} leads out of {self.folder}; give a plain name, with / for subfolders.")
        return path


def _holds(path: Path, delta: ConceptDelta) -> bool:
    """Whether a file is this delta, but for its picture."""
    try:
        there = ConceptDelta.load(path)
    except SepMEError:
        return False
    return replace(there, thumbnail="").to_bytes() == replace(delta, thumbnail="").to_bytes()


def _delta_files(folder: Path) -> list[Path]:
    """The ``.safetensors`` files below a folder, whatever the case of their ending; links are followed, but no link back up."""
    files: list[Path] = []
    inside: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}  # real paths of a folder and those around it
    for where, folders, names in os.walk(folder, followlinks=True):
        around = inside.pop(where)
        files += [Path(where, name) for name in names if name.lower().endswith(".safetensors")]
        real = {name: os.path.realpath(os.path.join(where, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in around]
        inside |= {os.path.join(where, name): (*around, real[name]) for name in folders}
    return sorted(files)


def _read(folder: Path, path: Path, size: int) -> Entry | None:
    try:
        header, _ = read_header(path)
    except SepMEError:
        return None
    return Entry(
        name=path.relative_to(folder).as_posix(),
        path=path,
        bytes=size,
        concept=header.get("concept", ""),
        content_hash=header.get("content_hash", ""),
        architecture=header.get("architecture", ""),
        kv_fingerprint=header.get("kv_fingerprint", "").strip('"'),
    )


def resolve(wanted: str, items: Sequence[str | Entry | ConceptDelta]) -> list[int]:
    """Which of some deltas a text means: a concept's name, a label ``name [hash]``, a file or a hash, the first of these that any has.

    Args:
        wanted: a file counts with or without its folders and ``.safetensors``, a hash from 6 digits on.
        items: deltas, entries of a library, or mere names.

    Returns:
        indices; several when it means several, none when it means none.
    """
    text, rows = normalised(wanted), [_known_as(item) for item in items]
    label = re.fullmatch(r"(.+) \[([0-9a-f]{6,64})\]", text)
    path = "/" + text.replace("\\", "/").removesuffix(".safetensors")

    def is_file(file: str) -> bool:
        return f"/{normalised(file).removesuffix('.safetensors')}".endswith(path)

    kinds: tuple[Callable[[str, Callable[[], str], str], bool], ...] = (
        lambda concept, digest, file: concept == text,
        lambda concept, digest, file: label is not None and concept == label[1] and digest().startswith(label[2]),
        lambda concept, digest, file: bool(file) and is_file(file),
        lambda concept, digest, file: is_file(file_name(concept)),
        lambda concept, digest, file: re.fullmatch(r"[0-9a-f]{6,64}", text) is not None and digest().startswith(text),
    )
    for fits in kinds:
        if found := [i for i, row in enumerate(rows) if fits(*row)]:
            return found
    return []


def _known_as(item: str | Entry | ConceptDelta) -> tuple[str, Callable[[], str], str]:
    """Concept, content hash (found out when needed) and file."""
    if isinstance(item, str):
        return normalised(item), lambda: "", ""
    if isinstance(item, ConceptDelta):
        return normalised(item.concept.name), item.content_hash, item.file
    return normalised(item.concept), lambda: item.content_hash, item.name


def embed(delta: ConceptDelta) -> str:
    """A delta file as text.

    Raises:
        SepMEError: it is too large for that.
    """
    data = delta.to_bytes()
    if len(data) > MAX_EMBEDDED:
        raise SepMEError(
            f"The delta of {delta.concept.name!r} has {len(data) >> 10} kB, too much to travel inside a workflow (at most "
            f"{MAX_EMBEDDED >> 10} kB); share the file, or train it with a smaller max_rank."
        )
    return base64.b64encode(data).decode()


def unembed(text: str, what: str = "the delta inside the workflow") -> ConceptDelta:
    """A delta from the text of :func:`embed`; it passes the same checks as a file.

    Raises:
        SepMEError: no such text, or a damaged file.
    """
    if len(text) > 2 * MAX_EMBEDDED:
        raise SepMEError(f"{what[0].upper()}{what[1:]} is too large to be one; share the file instead.")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SepMEError(f"{what[0].upper()}{what[1:]} is damaged (no base64); get the workflow again, or the file.") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embedded.safetensors"
        path.write_bytes(data)
        try:
            return replace(ConceptDelta.load(path), file="")
        except SepMEError as error:
            raise SepMEError(str(error).replace(str(path), what)) from None
