"""The delta files as the page sees them: listed, installed, renamed, deleted."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ..sepme.concepts import reserved
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.format import MAX_FILE
from ..sepme.delta.library import DeltaLibrary, Entry
from ..sepme.errors import SepMEError
from .facts import PageFacts, describe

MAX_NAME, MAX_DEPTH = 200, 4  # characters and folders of a file name
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\\ud800-\udfff\ufffd]')


class Taken(SepMEError):
    """Another file has this name."""


class Absent(SepMEError):
    """No delta has this name."""


class TooLarge(SepMEError):
    """More bytes than a delta can have."""


def checked_name(name: Any) -> str:
    """A file name below the folder, with forward slashes, that is a good one on every system.

    Raises:
        SepMEError: it is none.
    """
    if not isinstance(name, str) or not name.lower().endswith(".safetensors") or len(name.encode(errors="replace")) > MAX_NAME:
        raise SepMEError(f"A delta's file name ends in .safetensors and has at most {MAX_NAME} characters; choose such a one.")
    parts = name.split("/")
    for part in parts:
        bad = not part or part.startswith((".", " ")) or reserved(part) or _FORBIDDEN.search(part)
        if bad or part.lower() == ".safetensors":
            raise SepMEError(f"The file name {name[:60]!r} is not allowed; use plain names, with / for subfolders.")
    if len(parts) > MAX_DEPTH:
        raise SepMEError(f"The file name {name[:60]!r} has more than {MAX_DEPTH - 1} folders; use fewer.")
    return name


class Library:
    """What the page may do with the files of a library; every name is checked, nothing leaves the folders."""

    def __init__(self, library: DeltaLibrary) -> None:
        self.library = library

    def list(self) -> list[PageFacts]:
        """All deltas, those that several files hold once, with the other files' names; headers are read once."""
        entries, copies = self.library.unique(), self.library.entries()
        names: dict[tuple[str, str], list[str]] = {}
        for copy in copies:
            names.setdefault(copy.same, []).append(copy.name)
        return [describe(entry, names[entry.same][1:]) for entry in entries]

    def get(self, name: Any) -> Entry:
        """The delta of this name.

        Raises:
            Absent: there is none.
        """
        for entry in self.library.entries():
            if entry.name == name:
                return entry
        raise Absent(f"There is no delta {str(name)[:60]!r} in models/sepme; load the list again.")

    def place(self, name: Any) -> Path:
        """Where a file of this name goes."""
        path = self.library.place(checked_name(name))
        if path.is_symlink() or path.is_dir():
            raise SepMEError(f"The name {str(name)[:60]!r} is a link or a folder; choose another one.")
        return path

    async def receive(self, name: Any, body: AsyncIterator[bytes], replace: bool) -> PageFacts:
        """Install a delta from a stream: a file of its own beside the place, checked whole, then renamed.

        Raises:
            Taken: another delta has the name, and ``replace`` was not asked for.
            TooLarge: the body is larger than a delta can be.
            SepMEError: no delta, or a bad name.
        """
        path = self.place(name)
        part = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=f".{path.name[:60]}.", suffix=".part", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                size = 0
                async for piece in body:
                    size += len(piece)
                    if size > MAX_FILE:
                        raise TooLarge(f"A delta has less than {MAX_FILE >> 20} MB; this is another kind of file.")
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            return self._install(Path(part), path, str(name), replace)
        except OSError as error:
            raise SepMEError(f"models/sepme cannot be written ({error.strerror}); make room or change its permissions.") from None
        finally:
            if part is not None and os.path.exists(part):
                os.unlink(part)

    def _install(self, part: Path, path: Path, name: str, replace: bool) -> PageFacts:
        try:
            delta = ConceptDelta.load(part)
        except SepMEError as error:
            raise SepMEError(str(error).replace(str(part), name)) from None
        os.chmod(part, 0o644)
        if replace:
            os.replace(part, path)
        elif there := [e for e in self.library.entries() if (e.content_hash, e.concept) == (delta.content_hash(), delta.concept.name)]:
            return describe(min(there, key=lambda e: e.name != name))  # installed already
        elif not (path.exists() and path.read_bytes() == part.read_bytes()):
            _rename(part, path, delta.concept.name)
        return describe(self.get(name))

    def rename(self, old: Any, new: Any) -> PageFacts:
        """Give a delta another name in its folder.

        Raises:
            Absent, Taken, SepMEError.
        """
        entry = self.get(old)
        if old == new:
            return describe(entry)
        folder = self._folder(entry)
        target = DeltaLibrary(lambda: [folder]).place(checked_name(new))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _rename(entry.path, target, entry.concept)
        except OSError as error:
            raise SepMEError(f"{str(old)[:60]!r} cannot be renamed ({error.strerror}); check the folder's permissions.") from None
        return describe(self.get(new))

    def delete(self, name: Any, content_hash: Any) -> str:
        """Delete a delta; its content hash is the confirmation that this very file is meant.

        Raises:
            Absent: no delta of this name has this hash.
        """
        entry = self.get(name)
        if not content_hash or entry.content_hash != content_hash:
            raise Absent(f"{entry.name!r} is not the delta that was shown; load the list again.")
        self._folder(entry)
        try:
            entry.path.unlink()
        except OSError as error:
            raise SepMEError(f"{entry.name!r} cannot be deleted ({error.strerror}); check the folder's permissions.") from None
        return entry.name

    def _folder(self, entry: Entry) -> Path:
        """The model folder that a file lies in.

        Raises:
            SepMEError: a link leads out of it.
        """
        folder = Path(str(entry.path)[: -len(entry.name)])
        if entry.path.is_symlink() or not entry.path.resolve().is_relative_to(folder.resolve()):
            raise SepMEError(f"{entry.name!r} is a link to another place; rename or delete it there.")
        return folder


def _rename(source: Path, target: Path, concept: str) -> None:
    """Rename, unless the name is taken; atomic where the file system has hard links."""
    if target.exists() and not (os.path.samefile(source, target) and source.name.lower() == target.name.lower()):
        raise Taken(f"There is another file {target.name!r}; choose another name for the delta of {concept!r}, or replace it.")
    try:
        os.link(source, target)
    except FileExistsError:
        if not os.path.samefile(source, target):
            raise Taken(f"There is another file {target.name!r}; choose another name for the delta of {concept!r}.") from None
        os.replace(source, target)
    except OSError:
        os.replace(source, target)
    else:
        source.unlink()
