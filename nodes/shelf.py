"""The delta files as the page sees them: listed with what their headers say, installed, renamed, deleted."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..sepme.concepts import reserved
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.format import MAX_FILE, plain_json, read_header
from ..sepme.delta.library import DeltaLibrary, Entry
from ..sepme.errors import SepMEError

Facts = dict[str, Any]

MAX_NAME, MAX_DEPTH, SHOWN = 200, 4, 64  # characters and folders of a file name; prompts that are listed
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


class Shelf:
    """What the page may do with the files of a library; every name is checked, nothing leaves the folders."""

    def __init__(self, library: DeltaLibrary) -> None:
        self.library = library

    def list(self) -> list[Facts]:
        """All deltas, those that several files hold once, with the other files' names; headers are read once."""
        entries, copies = self.library.unique(), self.library.entries()
        names: dict[str, list[str]] = {}
        for copy in copies:
            names.setdefault(copy.content_hash, []).append(copy.name)
        return [describe(entry, names[entry.content_hash][1:]) for entry in entries]

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

    async def receive(self, name: Any, body: AsyncIterator[bytes], replace: bool) -> Facts:
        """Install a delta from a stream: a file of its own beside the place, checked whole, then renamed.

        Raises:
            Taken: another delta has the name, and ``replace`` was not asked for. TooLarge. SepMEError: no delta, or a bad name.
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

    def _install(self, part: Path, path: Path, name: str, replace: bool) -> Facts:
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

    def rename(self, old: Any, new: Any) -> Facts:
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


def describe(entry: Entry, copies: Sequence[str] = ()) -> Facts:
    """What the page shows of a delta and of other files that hold it; nothing is read but the header, and that once."""
    stat = entry.path.stat()
    facts = _facts(entry.path, stat.st_mtime_ns, stat.st_size)
    return {"name": entry.name, "bytes": entry.bytes, "copies": list(copies), **json.loads(facts)}


@lru_cache(maxsize=4096)
def _facts(path: Path, mtime: int, size: int) -> str:
    """As JSON: the cache must not be changed by who gets it, and text is small."""
    metadata, declared = read_header(path)
    info: dict[str, Any] = {}
    for key in ("prompts", "gate", "certificate", "objective", "recipe", "known", "kv_fingerprint", "clip_skip"):
        try:
            info[key] = plain_json(metadata[key])
        except (KeyError, ValueError, RecursionError):
            info[key] = None
    down = _mapping(declared.get("down")).get("shape")
    rank = down[0] if isinstance(down, list) and down else 0
    names = (metadata.get(key, "") for key in ("concept", "content_hash", "architecture"))
    return json.dumps(facts_of(*names, rank, info))


def facts_of_delta(delta: ConceptDelta) -> Facts:
    """The same of a delta in memory."""
    info = {**delta.info, "prompts": delta.concept.prompts, "gate": delta.gate}
    return facts_of(delta.concept.name, delta.content_hash(), delta.architecture, delta.rank, info) | {"bytes": len(delta.to_bytes())}


def facts_of(concept: str, content_hash: str, architecture: str, rank: Any, info: Mapping[str, Any]) -> Facts:
    """The facts that a header and a delta in memory have in common; parts that are damaged are left out."""
    certificate, prompts = _mapping(info.get("certificate")), info.get("prompts")
    linear, gated = _numbers(certificate.get("leakage_linear")), _numbers(certificate.get("leakage_gated"))
    train = {k: v for k, v in _mapping(_mapping(info.get("recipe")).get("train")).items() if isinstance(v, (int, float, str))}
    return {
        "concept": concept,
        "content_hash": content_hash,
        "architecture": architecture,
        "kv_fingerprint": info.get("kv_fingerprint") if isinstance(info.get("kv_fingerprint"), str) else "",
        "rank": rank if isinstance(rank, int) else 0,
        "prompts": [str(p) for p in prompts[:SHOWN]] if isinstance(prompts, (list, tuple)) else [],
        "known": [str(c.get("name", "")) for c in info.get("known") or () if isinstance(c, Mapping)][:1024],
        "train": train,
        "clip_skip": _number(info.get("clip_skip")) or 0,
        "gate": _number(info.get("gate")),
        "gate_low": _number(certificate.get("gate_low")),
        "gate_high": _number(certificate.get("gate_high")),
        "false_touch_rate": _number(certificate.get("false_touch_rate")),
        "kept_energy": _number(certificate.get("kept_energy")),
        "leakage": max(linear.values(), default=0.0),
        "leakage_gated": max(gated.values(), default=0.0),
        "leakage_by_name": linear,
        "grade": grade(_number(info.get("gate")), certificate, gated),
    }


def grade(gate: float | None, certificate: Mapping[str, Any], gated: Mapping[str, float]) -> str:
    """The certificate in one word.

    ``poor``: prompts that must not change pass the gate, or the concept's own do not. ``fair``: ordinary prompts pass it, or it has
    little room: less than a tenth between what passes and what does not. ``good``: none of these. ``unknown``: no certificate.
    """
    low, high = _number(certificate.get("gate_low")), _number(certificate.get("gate_high"))
    if gate is None or low is None or high is None:
        return "unknown"
    if any(gated.values()) or gate >= high:
        return "poor"
    return "fair" if _number(certificate.get("false_touch_rate")) or high - low < 0.1 * high else "good"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(value: Any) -> dict[str, float]:
    return {str(k): v for k, v in _mapping(value).items() if _number(v) is not None}
