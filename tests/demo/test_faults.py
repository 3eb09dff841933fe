"""A full disk and too little memory: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sepme import cli
from sepme.concepts import file_name
from sepme.hosts.diffusers import DiffusersHost

TRAIN = ["--nearby", "0", "--steps", "12", "--threshold", "-1", "--batch", "1"]


@contextmanager
def disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes (Python ignores SIGXFSZ, so writes fail as on a full disk)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one error line of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["sepme", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("sepme: ")]
    assert stop.value.code == 2, err
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def book(tmp_path: Path, demo_host: DiffusersHost, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cli.options.ModelOptions, "load", lambda *_: demo_host)
    path = tmp_path / "book.yaml"
    path.write_text("- star\n")
    return path


@pytest.mark.parametrize("what", ["delta", "checkpoint", "picture"])
def test_full_disk(what: str, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments: list[Any] = ["train", "demo", book, "-o", out, *TRAIN]
    if what == "delta":
        arguments += ["--objective", "closed-form"]
    elif what == "checkpoint":
        import functools

        from sepme.train import TrainOptions

        monkeypatch.setattr(TrainOptions, "for_mode", functools.partial(TrainOptions.for_mode, checkpoint_every=5))
    else:
        arguments = ["generate", "demo", "a star", "-o", out / "a.png", "--steps", "2"]
    with disk(1024):
        message = failure(monkeypatch, capsys, *arguments)
    name = {"delta": "star.safetensors", "checkpoint": "star.checkpoint.safetensors", "picture": "a.png"}[what]
    assert f"{name} cannot be written (File too large)" in message
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory(
    error: Exception,
    book: Path,
    tmp_path: Path,
    demo_host: DiffusersHost,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def predict(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(demo_host, "predict", predict)
    message = failure(monkeypatch, capsys, "train", "demo", book, "-o", tmp_path / "out", *TRAIN)
    assert message.startswith("sepme: out of memory; ")
    assert "--" not in message
    assert list((tmp_path / "out").iterdir()) == []


def test_real_allocation_failure(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch that no machine holds, refused by torch's own allocator."""
    message = failure(monkeypatch, capsys, "train", "demo", book, "-o", tmp_path / "out", "--nearby", 0, "--steps", "2", "--batch", 1 << 38)
    assert message.startswith("sepme: out of memory; ")


def test_long_names_get_short_file_names() -> None:
    assert len(file_name("\u6f22" * 128).encode()) <= 200
