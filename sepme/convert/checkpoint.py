"""Deltas merged into a checkpoint, in the layout of the original: a single file or a diffusers folder. No model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..apply.toggles import Toggles
from ..delta.concept_delta import ConceptDelta
from ..delta.format import check_replaceable
from ..errors import SepMEError
from ..files import PLAIN, check_precision, refuse_pickle, write_atomically
from ..model.families import find, fits
from .lora import GATE_OFF, weighed, whole_factor

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.onnx", "*.onnx_data")
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # of the unmerged file
PIECE, MAX_HEADER = 16 << 20, 100 << 20


def export_checkpoint(deltas: Sequence[ConceptDelta], model: str | Path, out: str | Path, strengths: Toggles | None = None) -> Path:
    """Write a copy of a model with ``W + Σ_i s_i Y_i D_iᵀ`` in its to_k and to_v; every other tensor keeps its bytes and place.

    The gate is off in merged weights, they are rounded to the file's precision, and SDXL's pooled part has no place in them. Of an
    edit of the context Y is ``W S``.

    Args:
        deltas: of the model's architecture.
        model: a ``.safetensors`` checkpoint or a diffusers folder.
        out: a file for a file, a new folder for a folder.
        strengths: by concept, 1 where not given.

    Raises:
        SepMEError: a model of another architecture, quantised or damaged; an unknown concept; weights that would overflow; a place
            that cannot be written.
    """
    model, out = Path(model), Path(out)
    chosen = weighed(deltas, strengths)
    refuse_pickle(model)
    if model.is_dir():
        return _folder(chosen, model, out)
    if out.suffix.lower() != ".safetensors":
        raise SepMEError(f"{out} is no name for a checkpoint; end it in .safetensors.")
    file = _File.open(model)
    keys = _checked(model, [file], [d for d, _ in chosen])
    check_replaceable(out, inputs=[model, *(Path(d.file) for d, _ in chosen if d.file)])
    return write_atomically(out, file.merged(chosen, keys))


def model_weights(model: str | Path) -> dict[str, Tensor]:
    """W ``(d_out, d_in)`` by projection name of a ``.safetensors`` checkpoint or a diffusers folder; nothing else of it is read.

    Raises:
        SepMEError: no such model, damaged or quantised; no layers that read text in it.
    """
    model = Path(model)
    refuse_pickle(model)
    files = _files(model) if model.is_dir() else [_File.open(model)]
    found: dict[str, Tensor] = {}
    keys = _checked(model, files)
    for file in files:
        with safe_open(file.path, framework="pt") as opened:
            found |= {site: opened.get_tensor(key) for site, key in keys.items() if key in file.entries}
    return found


@dataclass(frozen=True)
class _File:
    """A safetensors file by its header: where its tensors lie."""

    path: Path
    start: int
    entries: Mapping[str, Any]
    metadata: Mapping[str, str]

    @staticmethod
    def open(path: Path) -> _File:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
                if not 2 <= length <= min(size - 8, MAX_HEADER):
                    raise ValueError("header")
                entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__", {})
            for entry in entries.values():
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= size - 8 - length or not all(isinstance(n, int) for n in entry["shape"]):
                    raise ValueError("offsets")
                entry["dtype"].encode()
            return _File(path, 8 + length, entries, metadata)
        except OSError as error:
            raise SepMEError(f"{path} cannot be read ({error.strerror}); check the path.") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise SepMEError(f"{path} is no safetensors file or is cut short; get it again.") from None

    def merged(self, chosen: Sequence[tuple[ConceptDelta, float]], keys: Mapping[str, str]) -> Iterator[bytes]:
        """The file's bytes with the changed weights, in pieces; the header differs in its metadata alone."""
        names = {key: name for name, key in keys.items() if key in self.entries}
        facts = {"sepme.concepts": json.dumps([{"name": d.concept.name, "strength": s} for d, s in chosen]), "sepme.gate": GATE_OFF}
        metadata = {k: v for k, v in self.metadata.items() if k not in HASHES} | facts
        raw = json.dumps({"__metadata__": metadata, **self.entries}, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        yield struct.pack("<Q", len(raw)) + raw
        with open(self.path, "rb") as file:
            file.seek(self.start)
            place = 0
            for key, entry in sorted(self.entries.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                yield from _pieces(file, begin - place)
                if key in names:
                    yield self._changed(b"".join(_pieces(file, end - begin)), entry, names[key], chosen)
                else:
                    yield from _pieces(file, end - begin)
                place = end

    def _changed(self, data: bytes, entry: Mapping[str, Any], name: str, chosen: Sequence[tuple[ConceptDelta, float]]) -> bytes:
        dtype = PLAIN[entry["dtype"]]
        weight = torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry["shape"])
        change: Tensor = sum(s * (whole_factor(d, name, weight) @ d.down) for d, s in chosen)  # type: ignore[assignment]
        result = (weight.to(torch.promote_types(dtype, torch.float32)) + change).to(dtype) if change.any() else weight
        if not result.isfinite().all():
            raise SepMEError(f"{name} of {self.path} would overflow {entry['dtype']}; lower the strengths.")
        return result.contiguous().view(torch.uint8).numpy().tobytes()


def _pieces(file: Any, count: int) -> Iterator[bytes]:
    while count:
        piece = file.read(min(count, PIECE))
        if not piece:
            raise SepMEError(f"{file.name} became shorter while it was read; try again.")
        count -= len(piece)
        yield piece


def _checked(model: Path, files: Sequence[_File], deltas: Sequence[ConceptDelta] = ()) -> dict[str, str]:
    """Names of the weights by site, where they have the shapes that deltas are for and a precision that can be added to."""
    entries = {key: entry for file in files for key, entry in file.entries.items() if key.endswith(".weight")}
    keys = {site: f"{name}.weight" for site, name in find(key.removesuffix(".weight") for key in entries).items()}
    shapes = {site: tuple(entries[key]["shape"]) for site, key in keys.items()}
    if not shapes:
        raise SepMEError(f"{model} holds no layers that read text; name a Stable Diffusion checkpoint or a diffusers folder.")
    for delta in deltas:
        wrong = shapes != delta.shapes if delta.projections else {shape[1] for shape in shapes.values()} != {delta.d_in}
        if wrong:
            what = (
                f"of the architecture {delta.architecture}"
                if delta.projections
                else f"for edits of the context of {fits(delta.architecture)}"
            )
            raise SepMEError(f"{model} is no model {what} of {delta.concept.name!r}; name the one it is for.")
    for key in keys.values():
        check_precision(model, key, entries[key]["dtype"])
    return keys


def _files(model: Path) -> list[_File]:
    """Of a diffusers folder's UNet."""
    files = [_File.open(path) for path in sorted((model / "unet").glob("*.safetensors"))]
    if not (model / "model_index.json").is_file() or not files:
        raise SepMEError(f"{model} is no diffusers folder with a UNet in safetensors; name one, or a single .safetensors file.")
    return files


def _folder(chosen: Sequence[tuple[ConceptDelta, float]], model: Path, out: Path) -> Path:
    files = _files(model)
    keys = _checked(model, files, [d for d, _ in chosen])
    if out.resolve().is_relative_to(model.resolve()):
        raise SepMEError(f"{out} is the model itself or lies in it; write the merged one to a folder of its own.")
    if out.exists():
        raise SepMEError(f"{out} is there already; choose a new name for the merged model's folder.")
    part = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        whole = part / out.name
        shutil.copytree(model, whole, ignore=shutil.ignore_patterns(*PICKLES))
        for file in files:
            write_atomically(whole / "unet" / file.path.name, file.merged(chosen, keys))
        os.replace(whole, out)
    except OSError as error:  # shutil's own is one too
        raise SepMEError(f"{out} cannot be written ({error.strerror or 'copying failed'}); choose another folder with room left.") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return out
