"""Files: whole or not at all when written, the same bytes every time, no pickle and no quantised weights when read."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from sepme.errors import SepMEError
from sepme.files import (
    check_file_precision,
    check_writable,
    first_line,
    refuse_pickle,
    remove_leftovers,
    safetensors_bytes,
    write_atomically,
)  # fmt: skip


def test_disk_full_keeps_the_old_file(tmp_path: Path) -> None:
    """A real write that stops half way: the process may write no file beyond 4 kB."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SepMEError, match=r"cannot be written \(File too large\)"):
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the write and the rename."""

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"data")
    assert list(tmp_path.iterdir()) == []


def test_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "new" / "a", iter([b"one ", b"two"]))
    assert path.read_bytes() == b"one two"
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Only of this path: also where its name has characters that mean something in a pattern."""
    path = tmp_path / "a[1].safetensors"
    left, other = tmp_path / f".{path.name}.x1.part", tmp_path / ".a1.safetensors.x1.part"
    left.touch(), other.touch()
    remove_leftovers(path)
    assert list(tmp_path.iterdir()) == [other]


def test_the_same_tensors_are_the_same_bytes() -> None:
    """In any order; the header is sorted and padded as safetensors wants it."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16)}
    facts = {f"key {i}": str(i) for i in range(9)}
    data = safetensors_bytes(tensors, facts)
    assert data == safetensors_bytes(dict(reversed(tensors.items())), dict(reversed(facts.items())))
    size = struct.unpack("<Q", data[:8])[0]
    assert size % 8 == 0
    assert json.loads(data[8 : 8 + size])["__metadata__"] == facts
    read = load(data)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["a.pt", "a.CKPT", "a.bin", "a.pickle"])
def test_pickles_are_refused_by_name(name: str) -> None:
    with pytest.raises(SepMEError, match="pickle"):
        refuse_pickle(Path(name))
    refuse_pickle(Path("a.safetensors"))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x.weight": torch.zeros(2), "x.position_ids": torch.arange(2)}, path)
    check_file_precision(path)
    save_file({"x.weight": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(SepMEError, match=r"quantised \(F8_E4M3 at x.weight\)"):
        check_file_precision(path)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SepMEError, match="cannot be written"):
        check_writable(tmp_path / "file" / "folder")
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 500))) == 120
