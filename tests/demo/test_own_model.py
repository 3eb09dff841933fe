"""The example of a model that is no Stable Diffusion, with little training: what it shows holds from the start."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tmp_path / "points.png"), steps=40)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{f}: {'changed' if f == 'circle' else 'bit for bit as before'}; given back: bit for bit" for f in example.FIGURES]
    assert (tmp_path / "points.png").stat().st_size > 1000
