"""Files: whole or not at all when written, never a pickle when read."""

from __future__ import annotations

import glob
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import SepMEError

PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # by name in a safetensors header


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. safetensors itself writes metadata in random order, so the header is written again, sorted."""
    data = save(dict(sorted(tensors.items())), metadata=dict(metadata))
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data[end:]


def refuse_pickle(path: Path) -> None:
    """Raise :class:`SepMEError` for a file that is a pickle by its name; it is not opened."""
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"):
        raise SepMEError(f"{path} is a pickle by its name; pickles can run code and are never opened, use a .safetensors file.")


def check_precision(path: Path, key: str, dtype: Any) -> None:
    """Raise :class:`SepMEError` unless a tensor holds plain numbers: quantised ones mean nothing without their scales.

    Args:
        dtype: torch's, or its name in a safetensors header.
    """
    if dtype not in PLAIN and dtype not in PLAIN.values():
        what = str(dtype).removeprefix("torch.")
        raise SepMEError(f"{path} is quantised ({what} at {key[:120]}); use the float16, bfloat16 or float32 file instead.")


def check_file_precision(path: Path) -> None:
    """The same for all tensors of a safetensors file but the position numbers of text encoders; only its header is read."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if not key.endswith("position_ids"):
                check_precision(path, key, file.get_slice(key).get_dtype())


def number(value: Any) -> Any:
    """The value, read from JSON, if it is a number; else a :class:`TypeError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("a figure is no number")
    return value


def text(value: Any) -> str:
    """The value, read from JSON, if it is valid text; else a :class:`TypeError` or :class:`ValueError`."""
    if not isinstance(value, str):
        raise TypeError("a name is no text")
    value.encode()
    return value


def first_line(error: Exception) -> str:
    """The start of an error's message, for a sentence of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


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


def write_atomically(path: str | Path, data: bytes | Iterable[bytes]) -> Path:
    """Write bytes, or one piece after the other, so that the path holds either the old or the whole new content.

    Raises:
        SepMEError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
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
