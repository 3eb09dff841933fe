"""Encodings that take long to make, kept in a folder that may be deleted at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence

from ..errors import SepMEError
from ..files import safetensors_bytes, write_atomically
from ..model.encoder_fingerprint import PROBES
from ..model.protocols import Encoding
from .vocabulary import shipped_texts

MOST = 1 << 30  # bytes of all files; the oldest go first
PART = 16  # shipped prompts that are stored together, and are not read again once they are


def digest(*parts: bytes | str) -> str:
    """A name for what is made of these."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return found.hexdigest()[:32]


class StoredEncodings:
    """Files of encodings by name.

    Args:
        folder: made when the first encoding is stored.
        exact: store contexts as they are. Otherwise they are in float16, each token beside its norm, so that tokens of any norm keep 11
            bits.
    """

    def __init__(self, folder: Path, exact: bool = False) -> None:
        self.folder, self.exact = folder, exact

    def made(self, read: Callable[[Sequence[str]], Encoding], identity: bytes, prompts: Sequence[str]) -> Encoding:
        """Prompts as they are stored; if they are not yet, as ``read`` reads them.

        Args:
            identity: of what reads them.
        """
        key = digest(identity, *prompts)
        found = self.get(key)
        if found is None:
            made = read(prompts)
            self.put(key, made)
            found = self.get(key) or made  # as it will be read the next time
        return found

    def get(self, key: str) -> Encoding | None:
        """The encoding of this name; None where there is none or its file is damaged."""
        try:
            with safe_open(self.folder / f"{key}.safetensors", framework="pt") as file:
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            context = found["context"].float() * found["norm"] if "norm" in found else found["context"]
            return Encoding(context, found["mask"].bool(), found.get("pooled"))
        except (SafetensorError, OSError, KeyError):
            return None

    def put(self, key: str, encoding: Encoding) -> None:
        """Store an encoding and make room for it; where nothing can be written, nothing is."""
        tensors = {"mask": encoding.mask.to(torch.uint8), "context": encoding.context.contiguous()}
        if not self.exact:
            norm = encoding.context.float().norm(dim=-1, keepdim=True) / encoding.context.shape[-1] ** 0.5
            tensors |= {"context": (encoding.context.float() / norm.clamp_min(1e-30)).half(), "norm": norm}
        if encoding.pooled is not None:
            tensors["pooled"] = encoding.pooled.contiguous()
        with suppress(OSError, SepMEError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{key}.safetensors", safetensors_bytes(tensors, {}))
            files = sorted(self.folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime, reverse=True)
            total = 0
            for file in files:
                total += file.stat().st_size
                if total > MOST:
                    file.unlink()


def worth_storing(prompts: Sequence[str]) -> bool:
    """Whether these are many, and planning reads them whatever the concepts are."""
    return len(prompts) >= PART and shipped_texts().issuperset(prompts)


class StoredReader:
    """Prompts as an encoder reads them one by one; of what is :func:`worth_storing`, what is stored.

    The encoder is known by what it makes of a test prompt, to the bit: another precision or a patch has files of its own.

    Args:
        store: where; None stores nothing.
        read: of one prompt, the encoding of one row on the CPU.
    """

    def __init__(self, store: StoredEncodings | None, read: Callable[[str], Encoding]) -> None:
        self._store, self._read = store, read

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """See :class:`~sepme.model.protocols.TextEncoder`."""
        if self._store is None or not worth_storing(prompts):
            return self._each(prompts)
        parts = [self._store.made(self._each, self._identity, prompts[i : i + PART]) for i in range(0, len(prompts), PART)]
        return _joined([part.rows([i]) for part in parts for i in range(len(part.context))])

    def _each(self, prompts: Sequence[str]) -> Encoding:
        return _joined([self._read(p) for p in prompts])

    @cached_property
    def _identity(self) -> bytes:
        return identity(self._read(PROBES[0]))


def identity(probe: Encoding) -> bytes:
    """What an encoder is known by to the bit, from how it reads the first of its fingerprint's prompts."""
    return probe.context.float().cpu().numpy().tobytes()


def _joined(rows: Sequence[Encoding]) -> Encoding:
    """Encodings of one row each as one, with zeros where a prompt has fewer tokens."""
    pooled = [r.pooled for r in rows if r.pooled is not None]
    return Encoding(
        pad_sequence([r.context[0] for r in rows], batch_first=True),
        pad_sequence([r.mask[0] for r in rows], batch_first=True),
        torch.cat(pooled) if pooled else None,
    )
