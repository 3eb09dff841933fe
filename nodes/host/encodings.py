"""Encodings that take long to make, kept in ComfyUI's user folder."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import folder_paths
import torch
from safetensors import SafetensorError, safe_open

from ...sepme.errors import SepMEError
from ...sepme.files import safetensors_bytes, write_atomically
from ...sepme.model.protocols import Encoding

MOST = 1 << 30  # bytes of all files; the oldest go first


def digest(*parts: bytes | str) -> str:
    """A name for what is made of these."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return found.hexdigest()[:32]


class StoredEncodings:
    """Files of encodings by name. Contexts are in float16, each token beside its norm, so that tokens of any norm keep 11 bits."""

    def __init__(self) -> None:
        self.folder = Path(folder_paths.get_user_directory()) / "sepme" / "encodings"

    def get(self, key: str) -> Encoding | None:
        """The encoding of this name; None where there is none or its file is damaged."""
        try:
            with safe_open(self.folder / f"{key}.safetensors", framework="pt") as file:
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return Encoding(found["context"].float() * found["norm"], found["mask"].bool(), found.get("pooled"))
        except (SafetensorError, OSError, KeyError):
            return None

    def put(self, key: str, encoding: Encoding) -> None:
        """Store an encoding and make room for it; where nothing can be written, nothing is."""
        norm = encoding.context.float().norm(dim=-1, keepdim=True) / encoding.context.shape[-1] ** 0.5
        tensors = {
            "context": (encoding.context.float() / norm.clamp_min(1e-30)).half(),
            "norm": norm,
            "mask": encoding.mask.to(torch.uint8),
        } | ({} if encoding.pooled is None else {"pooled": encoding.pooled.float().contiguous()})
        with suppress(OSError, SepMEError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{key}.safetensors", safetensors_bytes(tensors, {}))
            files = sorted(self.folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime, reverse=True)
            total = 0
            for file in files:
                total += file.stat().st_size
                if total > MOST:
                    file.unlink()
