"""``python -m sepme.demo.emoji``: which stages run with what, and what it says to a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo.emoji_packages import write_packages
from PIL import Image

from sepme.demo.emoji import __main__ as command
from sepme.demo.emoji.captions import load_words
from sepme.demo.emoji.things import THINGS


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["emoji", *arguments])
    command.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vae", "unet"), r"no stage 'unet'; there are render, vae, classifier, text, diffusion"),
        (("--things", "0"), r"--things is between 1 and 299"),
        (("--things", "300"), r"--things is between 1 and 299"),
    ],
)
def test_a_mistake_is_explained_before_anything_is_written(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments, "--work", str(tmp_path / "work"))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the denoiser would have been trained with: things, total steps, the step to stop at."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(command.Stages, "batches", lambda self, things: things)
    monkeypatch.setattr(command, "train_diffusion", lambda work, things, steps, until: seen.append((things, steps, until)))
    return seen


def test_things_come_in_a_curriculum(calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "diffusion", "--work", str(tmp_path))
    assert calls == [(20, 7200, 1000), *((50, 7200, until) for until in (3000, 9000, 10**9))]
    calls.clear()
    run(monkeypatch, "diffusion", "--work", str(tmp_path), "--until", "4000", "--steps", "9000", "--things", "60")
    assert calls == [(20, 9000, 1000), (50, 9000, 3000), (60, 9000, 4000)]


def test_words_are_read_off_the_packages_once(tmp_path: Path) -> None:
    write_packages(tmp_path / "npm")
    training = command.Stages(tmp_path)
    words = training.words()
    assert words == load_words(tmp_path / "words.json")
    assert words.kinds == {"everything": list(range(40))}
    assert words.synonyms[0] == ["onlyaak"]
    (tmp_path / "words.json").write_text('{"synonyms": [], "kinds": {}}')
    assert training.words().kinds == {}


def test_evaluation_makes_sheets_of_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    (tmp_path / "diffusion.pt").touch()
    (tmp_path / "latents.count").write_text("3")
    monkeypatch.setattr(command.Stages, "renders", lambda self: np.zeros((len(THINGS), 9, 8, 8, 4), np.uint8))
    monkeypatch.setattr(
        command, "unet_painter", lambda work, steps, guidance: lambda captions, seed: torch.zeros(len(captions), 3, 128, 128)
    )
    run(monkeypatch, "evaluate", "--work", str(tmp_path))
    for name in ("diffusion.png", "originals.png"):
        assert Image.open(tmp_path / name).size == (9 * 128, 3 * 128)
    assert not (tmp_path / "flow.png").exists()
    assert "read" not in capsys.readouterr().out  # there is no classifier
