"""Certificates measured again: they agree with what was stored, and what is not stored is asked for."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.verify import check_encoder, verify
from sepme.errors import SepMEError
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "big", "small") for thing in ("cat", "dog", "boat")]


@pytest.fixture
def preserve(tmp_path: Path) -> Path:
    (tmp_path / "preserve.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return tmp_path / "preserve.txt"


@pytest.fixture
def made(world: SimpleNamespace, preserve: Path) -> tuple[object, ConceptDelta]:
    encoder = world.Encoder(d_in=192)
    book = ConceptBook((Concept("moon", ("moon", "a moon")), Concept("star", ("star", "a star"))), ("a blue tree",), str(preserve))
    planner = Planner(encoder, book, PlanOptions())
    options = TrainOptions.for_mode(objective="closed-form")
    return encoder, make_delta(planner, "star", world.Denoiser(d_in=192), options, preserve.parent / "c.safetensors")


def test_what_is_measured_is_what_was_stored(made: tuple[object, ConceptDelta], preserve: Path) -> None:
    encoder, delta = made
    result = verify(encoder, [delta], preserve)
    (check,) = result.checks
    assert result.warnings == ()
    stored = delta.info["certificate"]
    for name, value in stored["leakage_linear"].items():  # stored: the worst over half precisions too
        assert check.leakage_linear[name] == pytest.approx(value, rel=0.02, abs=2e-3), name
    assert check.false_touch_rate == pytest.approx(stored["false_touch_rate"], abs=0.01)
    assert check.own_min > delta.gate
    assert result.matrix.shape == (1, 1)
    wide = verify(encoder, [replace(delta, gate=0.0)], preserve)
    assert not wide.holds
    assert wide.checks[0].leakage_gated == wide.checks[0].leakage_linear


def test_two_deltas_of_one_concept_are_refused(made: tuple[object, ConceptDelta], preserve: Path) -> None:
    encoder, delta = made
    with pytest.raises(SepMEError, match="Two deltas erase 'star'"):
        verify(encoder, [delta, replace(delta, gate=0.5)], preserve)


def test_clip_skip_is_recorded_and_compared(world: SimpleNamespace) -> None:
    """What the host says was in effect; 0 of hosts that know no clip skip."""
    encoder, plain = world.Encoder(d_in=192), world.Encoder(d_in=192)
    encoder.clip_skip = 1
    planner = Planner(encoder, ConceptBook((Concept("star", ("star", "a star")),)), PlanOptions())
    delta = make_delta(planner, "star", world.Denoiser(d_in=192), TrainOptions.for_mode(objective="closed-form"))
    assert delta.info["clip_skip"] == 1
    assert check_encoder(encoder, [delta]) == []
    assert "1 of CLIP's last layers skipped, here 0" in check_encoder(plain, [delta])[0]


def test_a_preserve_file_is_asked_for_and_known_again(made: tuple[object, ConceptDelta], preserve: Path) -> None:
    encoder, delta = made
    result = verify(encoder, [delta])
    assert [w for w in result.warnings if "9 preserved prompts of 'star'" in w and "--preserve" in w]
    preserve.write_text("\n".join([*PROMPTS, "a star cat"]), encoding="utf-8")
    other = verify(encoder, [delta], preserve)
    assert "is not the preserve file" in other.warnings[0]
    assert other.checks[0].leakage_linear["(preserved prompts)"] > result.checks[0].leakage_linear["(preserved prompts)"]
    assert not other.holds
