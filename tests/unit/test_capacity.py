"""The capacity report: its rows, its command, the names that are shipped for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planning import (
    HashedEncoder,
    numbered_book,
)
from typer.testing import CliRunner

from sepme import cli
from sepme.cli.verify import read_concepts
from sepme.errors import SepMEError
from sepme.plan import capacity as capacity_module
from sepme.plan.capacity import capacity, extended, shipped_names


def test_shipped_names_are_a_thousand_and_none_is_part_of_another() -> None:
    names = shipped_names()
    assert len(names) == len({n.casefold() for n in names}) >= 1000
    words = {n: f" {n.casefold()} " for n in names}
    assert not [(a, b) for a in names for b in names if a != b and words[a] in words[b]]
    with pytest.raises(SepMEError, match="names for"):
        extended(numbered_book(3), 2000)


def test_capacity_rows() -> None:
    rows = capacity(HashedEncoder(), numbered_book(3), (3, 12))
    assert [r.concepts for r in rows] == [3, 12]
    assert rows[0].mode == "exact"
    assert rows[0].leakage_linear_worst < 2e-3  # what rounding to bfloat16 leaves
    assert rows[0].gate_open == 1
    for r in rows:
        assert r.leakage_linear_worst >= r.leakage_linear_median >= r.leakage_gated_median >= 0
        assert 0 < r.kept_energy_min <= r.kept_energy_median <= 1


def test_many_are_planned_as_training_plans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_module, "MANY", 12)
    assert [r.mode for r in capacity(HashedEncoder(), numbered_book(3), (3, 12))] == ["exact", "soft"]


def test_capacity_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.yaml").write_text("[star, church]", encoding="utf-8")
    monkeypatch.setattr(cli.options.ModelOptions, "load", lambda _: HashedEncoder())
    arguments = ["verify", "demo", str(tmp_path / "book.yaml"), "--capacity", "--count", "2", "--count", "9"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["given"] == 2
    assert [r["concepts"] for r in data["capacity"]] == [2, 9]
    assert set(data["capacity"][0]) == set(capacity_module.CapacityRow.__dataclass_fields__)
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    with pytest.raises(SepMEError, match="either one book or delta files"):
        read_concepts([tmp_path / "book.yaml", tmp_path / "x.safetensors"])
