"""Encodings that are kept on disk: exact or in half the bytes, bounded, and nothing is said where nothing can be written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sepme.model.protocols import Encoding
from sepme.plan import stored
from sepme.plan.gate import ordinary_prompts
from sepme.plan.stored import StoredEncodings, StoredReader


def encoding(scale: float = 1.0) -> Encoding:
    generator = torch.Generator().manual_seed(0)
    return Encoding(scale * torch.randn(4, 8, 64, generator=generator), torch.ones(4, 8, dtype=torch.bool), torch.randn(4, 3))


def test_what_is_stored(tmp_path: Path) -> None:
    """The same bits where it is exact; else 11 bits of each token, whatever its norm."""
    one = encoding(1e6)
    exact = StoredEncodings(tmp_path / "exact", exact=True).made(lambda prompts: one, b"", ["a"])
    assert torch.equal(exact.context, one.context)
    assert torch.equal(exact.mask, one.mask)
    assert exact.pooled is not None
    assert one.pooled is not None
    assert torch.equal(exact.pooled, one.pooled)
    rounded = StoredEncodings(tmp_path / "half").made(lambda prompts: one, b"", ["a"]).context
    assert 0 < (rounded - one.context).abs().max() < 2**-10 * one.context.abs().max()
    sizes = [next((tmp_path / name).iterdir()).stat().st_size for name in ("half", "exact")]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_folder_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first; where nothing can be written, nothing is said."""
    store, one = StoredEncodings(tmp_path), encoding()
    store.put("a", one)
    monkeypatch.setattr(stored, "MOST", 2 * (tmp_path / "a.safetensors").stat().st_size)
    for i, name in enumerate("abc"):
        store.put(name, one)
        os.utime(tmp_path / f"{name}.safetensors", (1000 + i, 1000 + i))
    store.put("d", one)
    assert {f.stem for f in tmp_path.glob("*.safetensors")} == {"c", "d"}
    assert store.get("a") is None
    store.folder = tmp_path / "c.safetensors"  # no folder
    store.put("e", one)
    assert store.get("e") is None


def test_shipped_prompts_are_read_once(tmp_path: Path, world: SimpleNamespace) -> None:
    """By any reader of the same encoder; another encoder reads anew, and a user's prompts are never stored."""

    def reader(d_in: int) -> tuple[StoredReader, list[list[str]]]:
        encoder = world.Encoder(d_in)
        return StoredReader(StoredEncodings(tmp_path), lambda prompt: encoder.encode([prompt])), encoder.calls

    prompts = ordinary_prompts()[:40]
    (first, calls), (second, again), (other, anew) = reader(48), reader(48), reader(32)
    assert torch.equal(first.encode(prompts).context, second.encode(prompts).context)
    other.encode(prompts)
    assert [len(c) for c in (calls, again, anew)] == [41, 1, 41]  # one prompt tells encoders apart
    second.encode([*prompts[1:], "my own"])
    assert len(again) == 41
    assert len(list(tmp_path.iterdir())) == 6  # 16, 16 and 8 prompts, twice
