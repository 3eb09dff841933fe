"""Two local Ray workers, one killed in the middle: the bytes of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sepme import cli
from sepme.concepts import Concept, ConceptBook
from sepme.hosts.diffusers import DiffusersHost
from sepme.train import workers
from sepme.train.workers import Report, Setup

ray = pytest.importorskip("ray")
Hosts = Callable[..., DiffusersHost]
NAMES = ("tree", "star", "house")
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in NAMES), preserve=("the moon",))


@pytest.fixture(scope="module")
def model(make_host: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_host().pipe.save_pretrained(folder)
    return folder


def test_one_killed_in_the_middle(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker that reports is killed; its concept is retried from the checkpoint; every file has the bytes of one process."""
    book = tmp_path / "book.json"
    book.write_text(BOOK.dumps(), encoding="utf-8")
    command = ["train", str(model), str(book), "--steps", "120", "--batch", "1", "--threshold", "-1e9", "--nearby", "8", "--json"]
    assert CliRunner().invoke(cli.app, [*command, "-o", str(tmp_path / "one")], catch_exceptions=False).exit_code == 0
    killed: list[Report] = []
    after: list[Report] = []

    def train(setup: Setup, todo: Any, count: int, address: str | None, save: Any, on_report: Any, check: Any) -> None:
        def listen(report: Report) -> None:
            on_report(report)
            if not killed and any(g.checkpoint.exists() for g in todo if report.progress.concept in g.names):
                killed.append(report)
                os.kill(report.pid, signal.SIGKILL)
            elif killed and report.progress.concept == killed[0].progress.concept and report.pid != killed[0].pid:
                after.append(report)

        original(setup, todo, count, address, save, listen, check)

    original = workers.train_on_workers
    monkeypatch.setattr(workers, "train_on_workers", train)
    result = CliRunner().invoke(cli.app, [*command, "-o", str(tmp_path / "two"), "--workers", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert killed
    assert after
    assert after[0].progress.step > 50  # it went on from the checkpoint
    names = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert names == sorted(f"{n}.safetensors" for n in NAMES)
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not ray.is_initialized()
