"""Toggles: tags in prompts, JSON, precedence, the table of strengths."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sepme.apply.toggles import merge, parse_json, parse_tags, strengths
from sepme.concepts import normalised
from sepme.errors import SepMEError

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>:"), min_size=1, max_size=12).filter(str.strip)
STRENGTHS = st.floats(-100, 100, allow_nan=False)


@pytest.mark.parametrize(
    ("prompt", "cleaned", "toggles"),
    [
        ("a cat", "a cat", {}),
        ("a cat <erase:van gogh>", "a cat", {"van gogh": 1.0}),
        ("<erase:star:0.7> a cat, <keep:moon>, red", "a cat, red", {"star": 0.7, "moon": 0.0}),
        ("a <ERASE: Star : -1.5 >cat", "a cat", {"Star": -1.5}),
        ("a cat <erase:x>, dog", "a cat, dog", {"x": 1.0}),
        ("<erase:x>", "", {"x": 1.0}),
        ("<erase:x><keep:x> a", "a", {"x": 0.0}),
        ("<keep:a><erase:A><keep:a>b", "b", {"a": 0.0}),
        ("a  double  space", "a  double  space", {}),
        ("<lora:x:1> <b>", "<lora:x:1> <b>", {}),
        ("<lora:x:1> <erase:y> cat", "<lora:x:1> cat", {"y": 1.0}),
    ],
)
def test_tags(prompt: str, cleaned: str, toggles: dict[str, float]) -> None:
    assert parse_tags(prompt) == (cleaned, toggles)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<erase:>", "names no concept"),
        ("<keep: >", "names no concept"),
        ("<keep:x:0.5>", "<keep:name> takes none"),
        ("<erase:x:>", "no number between -100 and 100"),
        ("<erase:x:much>", "no number"),
        ("<erase:x:nan>", "no number"),
        ("<erase:x:inf>", "no number"),
        ("<erase:x:101>", "no number"),
        ("<erase:" + " " * 5000 + ">", "names no concept"),
        ("<keep:" + "x" * 5000 + ":1>", "<keep:name> takes none"),
    ],
)
def test_bad_tags(prompt: str, message: str) -> None:
    with pytest.raises(SepMEError, match=message) as refusal:
        parse_tags(prompt)
    assert len(str(refusal.value)) < 200


@given(NAMES, STRENGTHS, st.text("abc ,", max_size=20), st.text("abc ,", max_size=20))
def test_tag_round_trip(name: str, strength: float, before: str, after: str) -> None:
    cleaned, toggles = parse_tags(f"{before}<erase:{name}:{strength!r}>{after}")
    assert toggles == {name.strip(): strength}
    assert "<" not in cleaned
    assert cleaned.replace(" ", "").replace(",", "") == (before + after).replace(" ", "").replace(",", "")
    assert parse_tags(cleaned) == (cleaned, {})


@given(st.text("<>:erasekp0.1 ,x", max_size=40))
def test_any_prompt_is_parsed_or_refused(prompt: str) -> None:
    try:
        cleaned, toggles = parse_tags(prompt)
    except SepMEError:
        return
    assert all(abs(v) <= 100 for v in toggles.values())
    if not toggles:
        assert cleaned == prompt


def test_json() -> None:
    assert parse_json("") == parse_json(" \n") == {}
    assert parse_json('{"van gogh": 1, "b": 0.25, "c": true, "d": "0.5"}') == {"van gogh": 1.0, "b": 0.25, "c": 1.0, "d": 0.5}


@given(st.dictionaries(NAMES, STRENGTHS, max_size=5))
def test_json_round_trip(toggles: dict[str, float]) -> None:
    if len({normalised(n) for n in toggles}) == len(toggles):
        assert parse_json(json.dumps(toggles)) == toggles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("[1]", "one JSON object"),
        ("null", "one JSON object"),
        ('{"a": null}', "no number"),
        ('{"a": [1]}', "no number"),
        ('{"a": NaN}', "no number"),
        ('{"a": 1e999}', "no number"),
        ('{"a": ' + "9" * 400 + "}", "no number"),
        ('{"a": 1, "a": 0}', "a concept twice"),
        ('{"Van Gogh": 1, "van  gogh": 0}', "a concept twice"),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(SepMEError, match=message):
        parse_json(text)


def test_later_toggles_win() -> None:
    node, conditioning = {"Star": 1.0, "moon": 1.0}, {"star": 0.5, "tree": 0.2}
    tags = parse_tags("<keep:STAR> x")[1]
    assert merge(node, conditioning, tags) == {"STAR": 0.0, "moon": 1.0, "tree": 0.2}
    assert merge() == {}


def test_strengths_table() -> None:
    table = strengths([{}, {"STAR": 0.5}, {"moon": 0, "star": -2}], ["star", "moon"])
    assert torch.equal(table, torch.tensor([[1.0, 1.0], [0.5, 1.0], [-2.0, 0.0]]))
    assert table.dtype == torch.float32
    assert torch.equal(strengths([{"a": 1}], ["a", "b"], default=0.0), torch.tensor([[1.0, 0.0]]))
    assert strengths([], ["a"]).shape == (0, 1)


def test_strengths_of_unknown_concepts() -> None:
    with pytest.raises(SepMEError, match=r"no concept 'sun' here; loaded concepts: star, moon\."):
        strengths([{"sun": 1.0}], ["star", "moon"])
    with pytest.raises(SepMEError, match="loaded concepts: none"):
        strengths([{"sun": 1.0}], [])
