"""The delta format ``sepme.delta/1``: what a file may declare, checked before a tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..concepts import normalised
from ..errors import SepMEError
from ..files import refuse_pickle
from ..model.families import CONTEXT, is_other_text, is_site

FORMAT = "sepme.delta/1"
MAX_FILE, MAX_HEADER, MAX_RANK, MAX_WIDTH, MAX_DEPTH = 1 << 30, 16 << 20, 4096, 1 << 15, 32
MAX_GATE = 1e6  # of a share of a token's length: 1 or more never opens
MAX_NUMBER = 1 << 64  # of anything in a header: seeds are the largest that is meant
POOLED = ("pooled.down", "pooled.anchor")
GUARD = ("guard.queries", "guard.values", "guard.empty", "guard.give", "guard.take")
# metadata that is no info
OWN = {"format", "concept", "prompts", "anchor", "architecture", "gate", "content_hash", "header_hash", "parts", "guard_threshold"}

PART_FACTS = ("certificate", "text_encoder")  # what a file says of an edit of another text than the context, beside its gate


def header_hash(metadata: Mapping[str, str]) -> str:
    """SHA-256 of what the header says, but for itself and what other tools may show or change."""
    own = {k: v for k, v in metadata.items() if k != "header_hash" and not k.startswith("modelspec.")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and declared tensors of a file, without reading a tensor; sizes are capped first."""
    refuse_pickle(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise SepMEError(f"{path} has {size >> 20} MB; a delta has less than {MAX_FILE >> 20} MB, so this is another kind of file.")
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= size - 8:
                raise SepMEError(f"{path} is no safetensors file or is cut short; get it again.")
            if length > MAX_HEADER:
                raise SepMEError(f"{path}: its header has {length >> 20} MB, more than {MAX_HEADER >> 20} MB; this is no delta.")
            raw = file.read(length)
    except OSError as error:
        raise SepMEError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise SepMEError(f"{path} is no safetensors file; get it again.") from None
    if not isinstance(header, dict):
        raise SepMEError(f"{path} is no safetensors file; get it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SepMEError(f"{path}: its metadata is damaged; get the file again.")
    kind = metadata.get("format")
    if kind != FORMAT:
        what = f"format {kind[:40]!r}" if kind and kind.startswith("sepme") else "a foreign safetensors file"
        raise SepMEError(f"{path} is {what}, not {FORMAT}; a LoRA or checkpoint is no delta, and a newer format needs a newer SepME.")
    return metadata, header


def check_replaceable(path: Path, concept: str | None = None, inputs: Iterable[Path] = ()) -> None:
    """Raise :class:`SepMEError` if a file that is to be written would replace an input, or anything but a delta of this concept.

    Args:
        concept: None where no delta is written; then no delta may be replaced.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise SepMEError(f"{path} is a folder; name a file.")
    if any(other.exists() and path.samefile(other) for other in inputs):
        raise SepMEError(f"{path} is what this command reads; write to another name or folder.")
    try:
        holds = read_header(path)[0].get("concept", "")
    except SepMEError:
        if concept is not None:
            raise SepMEError(f"{path} is there and is no delta of {concept!r}; move it away, or write to another name or folder.") from None
        return
    if concept is None or normalised(holds) != normalised(concept):
        raise SepMEError(f"{path} holds the delta of {holds[:60]!r}; move it away, or write to another name or folder.")


def check_declared(path: Path, declared: Mapping[str, Any]) -> None:
    """Check names, types and shapes in the header before any tensor is read."""
    for part in parts_declared(declared):
        keys = {name: f"{name}.{part}" for name in ("down", "up")} | {"up.scale": f"up.{part}.scale"}
        own = {
            "down": declared[keys["down"]],
            f"up.{CONTEXT}": declared.get(keys["up"]),
            f"up.{CONTEXT}.scale": declared.get(keys["up.scale"]),
        }
        check_declared(path, {name: entry for name, entry in own.items() if entry is not None})
        declared = {name: entry for name, entry in declared.items() if name not in keys.values()}
    down = declared.get("down")
    if not isinstance(down, dict) or down.get("dtype") != "F32" or not _is_shape(down.get("shape"), 2):
        raise SepMEError(f"{path}: tensor 'down' is missing or is not a float32 matrix; this is no complete delta.")
    rank, d_in = declared["down"]["shape"]
    if not (1 <= rank <= MAX_RANK and 1 <= d_in <= MAX_WIDTH):
        raise SepMEError(f"{path}: 'down' has the impossible shape {rank} x {d_in}; this is no delta.")
    for name, entry in declared.items():
        if name in ("down", *POOLED, *GUARD) or (name.endswith(".scale") and _is_up(name[:-6]) and name[:-6] in declared):
            continue
        if not _is_up(name):
            raise SepMEError(f"{path}: it holds a foreign tensor {name[:60]!r}; this is no delta.")
        if not isinstance(entry, dict) or entry.get("dtype") != "F16" or not _is_shape(entry.get("shape"), 2):
            raise SepMEError(f"{path}: tensor {name!r} is not a float16 matrix; the file is damaged.")
        shape = entry["shape"]
        if shape[1] != rank or not 1 <= shape[0] <= MAX_WIDTH or (name == f"up.{CONTEXT}" and shape[0] != d_in):
            rows = d_in if name == f"up.{CONTEXT}" else "d_out"
            raise SepMEError(f"{path}: tensor {name!r} has shape {shape}, expected ({rows}, {rank}); the file is damaged.")
        scale = declared.get(f"{name}.scale")
        if not isinstance(scale, dict) or scale.get("dtype") != "F32" or scale.get("shape") != []:
            raise SepMEError(f"{path}: the scale of tensor {name!r} is missing; the file is damaged.")
    if not any(map(_is_up, declared)):
        raise SepMEError(f"{path}: it holds no up-factors; the file is damaged.")
    _check_pooled(path, *(declared.get(name) for name in POOLED))
    _check_guard(path, declared, d_in)


def parts_declared(names: Iterable[str]) -> list[str]:
    """The texts beside the context that a file edits, by its names of tensors."""
    return sorted(name[5:] for name in names if name.startswith("down.") and is_other_text(name[5:]))


def _check_pooled(path: Path, down: Any, anchor: Any) -> None:
    if down is None and anchor is None:
        return
    if not isinstance(down, dict) or down.get("dtype") != "F32" or not _is_shape(down.get("shape"), 2):
        raise SepMEError(f"{path}: tensor {POOLED[0]!r} is missing or is not a float32 matrix; the file is damaged.")
    rank, width = down["shape"]
    if not (1 <= rank <= MAX_RANK and 1 <= width <= MAX_WIDTH):
        raise SepMEError(f"{path}: {POOLED[0]!r} has the impossible shape {rank} x {width}; the file is damaged.")
    if not isinstance(anchor, dict) or anchor.get("dtype") != "F32" or anchor.get("shape") != [rank]:
        raise SepMEError(f"{path}: tensor {POOLED[1]!r} is missing or is not a float32 vector of {rank} values; the file is damaged.")


def _check_guard(path: Path, declared: Mapping[str, Any], d_in: int) -> None:
    found = {name: declared[name] for name in GUARD if name in declared}
    if not found:
        return
    for name in GUARD:
        entry = found.get(name)
        if not isinstance(entry, dict) or entry.get("dtype") != "F32" or not _is_shape(entry.get("shape"), 2):
            raise SepMEError(f"{path}: tensor {name!r} is missing or is not a float32 matrix; the file is damaged.")
    queries, values, empty, give, take = (tuple(found[name]["shape"]) for name in GUARD)
    readouts, tokens, rank = queries[0], empty[0], take[0]
    expected = ((readouts, d_in), (readouts, d_in), (tokens, d_in), (d_in, rank), (rank, d_in))
    if (queries, values, empty, give, take) != expected or not all(1 <= n <= MAX_RANK for n in (readouts, tokens, rank)):
        raise SepMEError(f"{path}: the shapes of its guard do not fit each other; the file is damaged.")


def _is_up(name: str) -> bool:
    return name == f"up.{CONTEXT}" or (name.startswith("up.") and is_site(name[3:]))


def _is_shape(value: Any, dims: int) -> bool:
    return isinstance(value, list) and len(value) == dims and all(isinstance(v, int) for v in value)


def plain_json(text: str) -> Any:
    """JSON without NaN, infinite and absurdly large numbers and deep nesting."""

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)) or abs(value) > MAX_NUMBER:
            raise ValueError(f"{digits[:20]} is no plausible number")
        return value

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=0)

    def whole(digits: str) -> int:
        if not -MAX_NUMBER <= (value := int(digits)) <= MAX_NUMBER:
            raise ValueError(f"{digits[:20]} is no plausible number")
        return value

    data = json.loads(text, parse_constant=number, parse_float=number, parse_int=whole)
    if depth(data) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    return data
