"""One concept's delta: ``ΔW_l = Y_l D ᵀ`` for every to_k and to_v, its gate and certificate, as one safetensors file.

Tensors: ``down`` (k, d_in) float32; ``up.<layer>.to_k`` / ``.to_v`` (d_out, k) float16, each with a float32 scalar
``<name>.scale``; for models with a pooled text vector optionally both ``pooled.down`` (k', d_pooled) and ``pooled.anchor`` (k',),
float32. Everything else is header metadata (strings, JSON inside). No dates: one recipe, one sequence of bytes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .concepts import Concept
from .errors import SepMEError, out_of_memory
from .layers import architecture
from .pooled import Pooled

FORMAT = "sepme.delta/1"
MAX_FILE, MAX_HEADER, MAX_RANK, MAX_WIDTH, MAX_DEPTH = 1 << 30, 16 << 20, 4096, 1 << 15, 32
POOLED = ("pooled.down", "pooled.anchor")
_UP = re.compile(r"up\.((?:input_blocks|output_blocks)\.\d+\.1|middle_block\.1)\.transformer_blocks\.\d+\.attn2\.to_[kv]")


@dataclass(frozen=True)
class ConceptDelta:
    """An immutable delta; it neither holds nor needs a model.

    Attributes:
        concept: what it erases.
        down: ``(k, d_in)`` float32, orthonormal rows.
        up: ``(d_out, k)`` float16 by projection name (``<layer>.to_k``); times ``scale`` of the same name it is Y.
        gate: γ of the row gate.
        info: JSON-able facts: known, preserve, objective, recipe, kv_fingerprint, certificate, clip_skip.
        pooled: what replaces the concept in the pooled vector, or None: the vector is left as it is.
    """

    concept: Concept
    down: Tensor
    up: Mapping[str, Tensor]
    scale: Mapping[str, float]
    gate: float
    info: Mapping[str, Any] = field(default_factory=dict)
    pooled: Pooled | None = None

    @staticmethod
    def from_factors(
        concept: Concept,
        down: Tensor,
        up: Mapping[str, Tensor],
        gate: float,
        info: Mapping[str, Any],
        pooled: Pooled | None = None,
    ) -> ConceptDelta:
        """Round float factors Y (``(d_out, k)`` by projection name, β folded in) to what a file holds.

        Raises:
            SepMEError: NaN or infinite values.
        """
        halves, scales = {}, {}
        for name, value in sorted(up.items()):
            value = value.detach().to("cpu", torch.float32)
            scale = float(value.abs().max()) if value.numel() else 0.0
            if not math.isfinite(scale) or not value.isfinite().all():
                raise SepMEError(f"The delta of {concept.name!r} became NaN or infinite at {name}; lower the learning rate.")
            scale = float(torch.tensor(scale or 1.0, dtype=torch.float32))
            halves[name], scales[name] = (value / scale).half().contiguous(), scale
        down = down.detach().to("cpu", torch.float32).contiguous()
        return ConceptDelta(concept, down, halves, scales, float(gate), dict(info), pooled)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def d_in(self) -> int:
        return self.down.shape[1]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(d_out, d_in)`` by projection name."""
        return {name: (value.shape[0], self.d_in) for name, value in self.up.items()}

    @property
    def architecture(self) -> str:
        return architecture(self.shapes)

    def up_factor(self, name: str) -> Tensor:
        """Y ``(d_out, k)`` float32 of a projection."""
        return self.up[name].float() * self.scale[name]

    def weight_delta(self, name: str) -> Tensor:
        """ΔW ``(d_out, d_in)`` float32 of a projection."""
        return self.up_factor(name) @ self.down

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, by name."""
        tensors = {"down": self.down}
        if self.pooled is not None:
            tensors |= {POOLED[0]: self.pooled.down, POOLED[1]: self.pooled.anchor}
        for name in self.up:
            tensors[f"up.{name}"] = self.up[name]
            tensors[f"up.{name}.scale"] = torch.tensor(self.scale[name], dtype=torch.float32)
        return dict(sorted(tensors.items()))

    def content_hash(self) -> str:
        """SHA-256 of names, shapes, types and bytes of the tensors."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], what: str = "the model") -> None:
        """Raise :class:`SepMEError` unless this delta is for a model with these K/V shapes."""
        if dict(shapes) != self.shapes:
            raise SepMEError(
                f"The delta of {self.concept.name!r} is for {self.architecture} (d_in {self.d_in}, {len(self.up)} projections), "
                f"but {what} is {architecture(shapes)}; train the concept on this model, or load the checkpoint it was made for."
            )

    def metadata(self) -> dict[str, str]:
        texts = {
            "format": FORMAT,
            "concept": self.concept.name,
            "prompts": json.dumps(self.concept.prompts),
            "anchor": self.concept.anchor,
            "architecture": self.architecture,
            "gate": repr(self.gate),
            "content_hash": self.content_hash(),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.architecture}/sepme-delta",
            "modelspec.title": f"SepME: {self.concept.name}",
            "modelspec.description": "A separable concept erasure for cross-attention to_k and to_v.",
        }
        texts |= {key: json.dumps(value, sort_keys=True) for key, value in self.info.items()}
        return texts | {"header_hash": _header_hash(texts)}

    def to_bytes(self) -> bytes:
        """The file."""
        return safetensors_bytes(self.tensors(), self.metadata())

    def save(self, path: str | Path) -> Path:
        """Write the file: temporary file in the same folder, fsync, rename.

        Raises:
            SepMEError: the folder cannot be written or the disk is full; nothing is left behind.
        """
        return write_atomically(path, self.to_bytes())

    @staticmethod
    def load(path: str | Path) -> ConceptDelta:
        """Read and check a file.

        Raises:
            SepMEError: missing, too large, no safetensors, another format, missing or foreign tensors, wrong shapes or
                types, NaN; the message names file and field.
        """
        path = Path(path)
        metadata, declared = _read_header(path)
        _check_declared(path, declared)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in sorted(declared)}  # not mapped: the file may change
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise SepMEError(f"{path} is damaged ({_first_line(error)}); get it again.") from None
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise SepMEError(f"{path}: tensor {name!r} holds NaN or infinite values; train it again.")
        return _assemble(path, metadata, tensors)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. safetensors itself writes metadata in random order, so the header is written again, sorted."""
    data = save(dict(sorted(tensors.items())), metadata=dict(metadata))
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data[end:]


def _header_hash(metadata: Mapping[str, str]) -> str:
    """SHA-256 of what the header says, but for itself and what other tools may show or change."""
    own = {k: v for k, v in metadata.items() if k != "header_hash" and not k.startswith("modelspec.")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def refuse_pickle(path: Path) -> None:
    """Raise :class:`SepMEError` for a file that is a pickle by its name; it is not opened."""
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"):
        raise SepMEError(f"{path} is a pickle by its name; pickles can run code and are never opened, use a .safetensors file.")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
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


def _check_declared(path: Path, declared: Mapping[str, Any]) -> None:
    """Check names, types and shapes in the header before any tensor is read."""
    down = declared.get("down")
    if not isinstance(down, dict) or down.get("dtype") != "F32" or not _is_shape(down.get("shape"), 2):
        raise SepMEError(f"{path}: tensor 'down' is missing or is not a float32 matrix; this is no complete delta.")
    rank, d_in = declared["down"]["shape"]
    if not (1 <= rank <= MAX_RANK and 1 <= d_in <= MAX_WIDTH):
        raise SepMEError(f"{path}: 'down' has the impossible shape {rank} x {d_in}; this is no delta.")
    for name, entry in declared.items():
        if name in ("down", *POOLED) or (name.endswith(".scale") and _UP.fullmatch(name[:-6]) and name[:-6] in declared):
            continue
        if not _UP.fullmatch(name):
            raise SepMEError(f"{path}: it holds a foreign tensor {name[:60]!r}; this is no delta.")
        if not isinstance(entry, dict) or entry.get("dtype") != "F16" or not _is_shape(entry.get("shape"), 2):
            raise SepMEError(f"{path}: tensor {name!r} is not a float16 matrix; the file is damaged.")
        shape = entry["shape"]
        if shape[1] != rank or not 1 <= shape[0] <= MAX_WIDTH:
            raise SepMEError(f"{path}: tensor {name!r} has shape {shape}, expected (d_out, {rank}); the file is damaged.")
        scale = declared.get(f"{name}.scale")
        if not isinstance(scale, dict) or scale.get("dtype") != "F32" or scale.get("shape") != []:
            raise SepMEError(f"{path}: the scale of tensor {name!r} is missing; the file is damaged.")
    if not any(_UP.fullmatch(name) for name in declared):
        raise SepMEError(f"{path}: it holds no up-factors; the file is damaged.")
    _check_pooled(path, *(declared.get(name) for name in POOLED))


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


def _is_shape(value: Any, dims: int) -> bool:
    return isinstance(value, list) and len(value) == dims and all(isinstance(v, int) for v in value)


def _plain_json(text: str) -> Any:
    """JSON without NaN, infinities and deep nesting."""

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is no number")
        return value

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=0)

    data = json.loads(text, parse_constant=number, parse_float=number)
    if depth(data) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    return data


def _check_info(info: Mapping[str, Any]) -> None:
    """Raise an error (of any plain type) unless the facts that commands read have the types that they expect."""
    for concept in info.get("known", []):
        Concept(concept["name"], tuple(concept["prompts"]))
    for prompt in info.get("preserve", {}).get("prompts", []):
        prompt.encode()
    objective, certificate = info.get("objective", {}), info.get("certificate", {})
    objective.get("name", "").encode()
    numbers = [objective.get("steps", 0), *info.get("losses", [])]
    for name in ("leakage_linear", "leakage_gated"):
        numbers += certificate.get(name, {}).values()
    numbers += [certificate.get(n, 0) for n in ("kept_energy", "gate_low", "gate_high", "gate_overlap", "false_touch_rate", "null_dims")]
    pooled = certificate.get("pooled") or {"mode": "", "residual": 0}
    pooled["mode"].encode()
    numbers.append(pooled["residual"])
    if not all(isinstance(v, (int, float)) for v in numbers):
        raise ValueError("a figure is no number")
    if not isinstance(info.get("kv_fingerprint", ""), str):
        raise ValueError("kv_fingerprint")


def _assemble(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> ConceptDelta:
    try:
        prompts = json.loads(metadata["prompts"])
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError("prompts")
        concept = Concept(metadata["concept"], tuple(prompts), metadata.get("anchor", ""))
        gate = float(metadata["gate"])
        own = {"format", "concept", "prompts", "anchor", "architecture", "gate", "content_hash", "header_hash"}
        info = {k: _plain_json(v) for k, v in metadata.items() if k not in own and not k.startswith("modelspec.")}
        _check_info(info)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SepMEError(f"{path}: its metadata is damaged ({_first_line(error)}); get the file again.") from None
    if not (math.isfinite(gate) and gate >= 0):
        raise SepMEError(f"{path}: its gate {gate} is no threshold; the file is damaged.")
    up = {k[3:]: v for k, v in tensors.items() if k.startswith("up.") and not k.endswith(".scale")}
    scale = {k: float(tensors[f"up.{k}.scale"]) for k in up}
    for name, value in up.items():
        if not (value.float() * scale[name]).isfinite().all():
            raise SepMEError(f"{path}: tensor 'up.{name}' times its scale is infinite; the file is damaged.")
    pooled = Pooled(tensors[POOLED[0]], tensors[POOLED[1]]) if POOLED[0] in tensors else None
    delta = ConceptDelta(concept, tensors["down"], up, scale, gate, info, pooled)
    if metadata.get("content_hash") != delta.content_hash() or metadata.get("header_hash") != _header_hash(metadata):
        raise SepMEError(f"{path}: its content does not match its hash; the file was damaged or changed, get it again.")
    return delta


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left of :func:`write_atomically` for this path."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise :class:`SepMEError` unless files can be made in this folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # nameless where the system can: nothing to leave behind
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: OSError) -> SepMEError:
    return SepMEError(f"{path} cannot be written ({error.strerror}); choose a folder that you may write to, with room left.")


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write bytes so that the path holds either the old or the whole new content.

    Raises:
        SepMEError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        if part is not None and os.path.exists(part):
            os.unlink(part)
    return path
