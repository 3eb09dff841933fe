"""What a header says of a delta, as types: read once, graded in one way, and written again byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest

from sepme.concepts import Concept
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.facts import Facts
from sepme.errors import SepMEError
from sepme.plan.gate import Certificate

LAYER = "middle_block.1.transformer_blocks.0.attn2"
SHAPES = {f"{LAYER}.to_k": (6, 16), f"{LAYER}.to_v": (6, 16)}
CERTIFICATE = Certificate({"moon": 0.03, "sun": 0.05}, {"moon": 0.0, "sun": 0.0}, 0.4, 0.2, 0.6, 0.0, 3, 12)
INFO: dict[str, Any] = {
    "known": [{"name": "moon", "prompts": ["moon", "a moon"]}], "preserve": {"count": 200, "sha256": "ab"}, "losses": [0.5, 0.25],
    "objective": {"name": "esd", "steps": 2, "beta": 1}, "kv_fingerprint": "0123", "clip_skip": 1,
    "recipe": {"train": {"steps": 2}, "plan": {"mode": "auto"}, "book": {"concepts": ["star"]}, "seed": 7},
    "certificate": CERTIFICATE.to_json() | {"separable": False}, "of a later version": {"x": [1, None]},
}  # fmt: skip
Make = Callable[..., ConceptDelta]


def test_facts_of_a_file(make_random_delta: Make, tmp_path: Path) -> None:
    delta = ConceptDelta.load(make_random_delta("star", SHAPES, gate=0.3, **INFO).save(tmp_path / "a.safetensors"))
    assert delta.certificate == CERTIFICATE
    assert (delta.certificate.worst_leakage, delta.certificate.worst_leakage_gated, delta.grade) == (0.05, 0.0, "good")
    assert delta.known == (Concept("moon", ("moon", "a moon")),)
    assert (delta.preserve.prompts, delta.preserve.count, delta.preserve.sha256) == ((), 200, "ab")
    assert (delta.recipe.train, delta.recipe.plan, delta.recipe.book) == ({"steps": 2}, {"mode": "auto"}, {"concepts": ["star"]})
    facts = delta.facts
    assert (facts.objective.name, facts.objective.steps, facts.losses) == ("esd", 2, (0.5, 0.25))
    assert (facts.kv_fingerprint, facts.clip_skip) == ("0123", 1)
    assert Facts.from_header(delta.metadata()) == facts


@pytest.mark.parametrize("info", [INFO, {}, {"certificate": {"rank": 3, "gate_low": 0.1}, "recipe": {"seed": 0}}])
def test_read_and_written_again_it_is_the_same_file(make_random_delta: Make, tmp_path: Path, info: dict[str, Any]) -> None:
    """Also with facts that this version does not know, or of an older one that had fewer."""
    path = make_random_delta("star", SHAPES, **info).save(tmp_path / "a.safetensors")
    loaded = ConceptDelta.load(path)
    assert loaded.facts == Facts.from_info(info)
    assert loaded.save(tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_what_a_file_does_not_say() -> None:
    facts = Facts.from_info({})
    assert facts.known == facts.preserve.prompts == facts.losses == ()
    assert (facts.objective.name, facts.objective.steps, facts.certificate.mode) == ("?", 0, "?")
    assert isnan(facts.certificate.gate_high)
    assert facts.certificate.grade(0.1) == "unknown"
    figures = json.loads(json.dumps(facts.certificate.to_json(), allow_nan=False))
    assert {figures[n] for n in ("kept_energy", "gate_low", "gate_high", "gate_overlap", "false_touch_rate", "null_dims", "pooled")} == {
        None
    }


@pytest.mark.parametrize(
    ("change", "gate", "grade"),
    [
        ({}, 0.3, "good"),
        ({"false_touch_rate": 0.001}, 0.3, "fair"),
        ({"gate_low": 0.55}, 0.58, "fair"),
        ({"leakage_gated": {"moon": 0.0, "sun": 0.31}}, 0.3, "poor"),
        ({}, 0.6, "poor"),
        ({"gate_low": 0.7}, 0.71, "poor"),
        ({}, nan, "unknown"),
        ({"gate_high": nan}, 0.3, "unknown"),
    ],
)
def test_grades(change: dict[str, Any], gate: float, grade: str) -> None:
    assert replace(CERTIFICATE, **change).grade(gate) == grade


DAMAGED = [
    {"certificate": [1]}, {"certificate": {"gate_low": "0.1"}}, {"certificate": {"gate_high": None}}, {"certificate": {"mode": 3}},
    {"certificate": {"leakage_linear": {"moon": True}}}, {"certificate": {"leakage_gated": [0.1]}},
    {"certificate": {"pooled": {"mode": "left"}}},
    {"known": {"moon": 1}}, {"known": [{"name": "moon"}]}, {"known": [{"name": "", "prompts": ["x"]}]}, {"known": [3]},
    {"preserve": {"prompts": [3]}}, {"preserve": {"count": "3"}}, {"preserve": {"sha256": 3}}, {"preserve": []},
    {"recipe": 3}, {"recipe": {"train": [1]}}, {"objective": {"steps": "1"}}, {"objective": {"name": 1}}, {"losses": [None]}, {"losses": 1},
    {"kv_fingerprint": 3}, {"clip_skip": "1"}, {"clip_skip": True},
]  # fmt: skip


@pytest.mark.parametrize("info", DAMAGED, ids=str)
def test_damaged_facts(make_random_delta: Make, tmp_path: Path, info: dict[str, Any]) -> None:
    """A file with facts of another type is refused in one line; a list of files shows what else the header says."""
    made = make_random_delta("star", SHAPES, **INFO | info)
    with pytest.raises(SepMEError, match="its metadata is damaged") as error:
        ConceptDelta.load(made.save(tmp_path / "a.safetensors"))
    assert "\n" not in str(error.value)
    (damaged,) = info
    left = Facts.from_header(made.metadata())
    assert left == replace(Facts.from_info(INFO), **{damaged: getattr(left, damaged)})
    assert getattr(left, damaged) == getattr(Facts(), damaged) or damaged == "certificate"
