"""Toggles: tags in prompts, JSON, precedence, the table of strengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sepme.apply.toggles import merge, parse_json, parse_tags, parse_toggle, strengths
from sepme.concepts import normalised
from sepme.delta.concept_delta import ConceptDelta
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
    ("prompt", "stock"),
    [
        ("a star <keep:star>", "a star"),
        ("a star, <keep:star>", "a star"),
        ("a star,<keep:star>", "a star"),
        ("<keep:star> a star", "a star"),
        ("<keep:star>, a star", "a star"),
        ("a <keep:star> star", "a star"),
        ("a star<keep:star>", "a star"),
        ("a <keep:star>star", "a star"),
        ("a red, <keep:star>, star", "a red, star"),
        ("a red,<keep:star>,star", "a red,star"),
        ("a red, <keep:star> star", "a red, star"),
        ("a red <keep:star>, star", "a red, star"),
        ("a red,<keep:star> star", "a red, star"),
        ("a red<keep:star>, star", "a red, star"),
        ("a,,  b ,, c , <keep:star>", "a,,  b ,, c "),
        ("  a  star ,,b, <keep:star> ", "  a  star ,,b "),
        ("a star <keep:star>.", "a star."),
        ("a  double  space <keep:star> here  too", "a  double  space here  too"),
        ("best,  red,\n<keep:star>\nb,\n\nc", "best,  red,\nb,\n\nc"),
        ("best,\n<keep:star>, b", "best,\nb"),
        ("best, <keep:star>\nb", "best,\nb"),
        ("best\n<keep:star>", "best"),
        ("a star <keep:star> <keep:moon>", "a star"),
        ("a star, <keep:star>, <keep:moon>", "a star"),
        ("<keep:star>, <keep:moon>, a star", "a star"),
        ("a star <keep:star> BREAK a moon", "a star BREAK a moon"),
        ("(a star <keep:star>:1.2), b", "(a star:1.2), b"),
        ("(<keep:star> a star:1.2), b", "(a star:1.2), b"),
        ("a star (<keep:star>:1.2)", "a star"),
        ("a star, ((<keep:star>)), b", "a star, b"),
        ("a star, (<keep:star>, <keep:moon>:0.5), b", "a star, b"),
        ("a star [<keep:star>]", "a star"),
        ("[a star <keep:star>:moon:0.5]", "[a star:moon:0.5]"),
        (r"char \(<keep:star>\)", r"char \(\)"),
    ],
)
def test_a_tag_leaves_the_stock_prompt(prompt: str, stock: str) -> None:
    """Byte for byte what it would be had the tag never been put in."""
    assert parse_tags(prompt)[0] == stock


@pytest.mark.parametrize(
    "prompt",
    [
        "a <lora:x:1:lbw=ALL>, <hypernet:keep:1>, <3, a<b, i <3 keep", "{red|blue} __color__ [a:b:0.5] [a|b] (a:1.2) \\(a\\)",
        "<keep-going> <keepsake> <erased_v2> <eraser:1> keep: star, erase:star", "(keep:1.2) [keep:erase:0.5] embedding:keep", "a > b > c",
        "&lt;b&gt; ＜光＞", "STYLE(keep) COUPLE(0 0.5) keep AND erase BREAK", "",
    ],
)  # fmt: skip
def test_other_syntax_is_left_alone(prompt: str) -> None:
    assert parse_tags(prompt) == (prompt, {})


@pytest.mark.parametrize(
    "tag",
    [
        "<keep:star:0.7:0.5>", "<erase:star:0.7:0.5>", "<erase:star:1:lbw=ALL>", "<keep:star", "<keep star>", "<keep>", "<keep", "<erase:",
        "＜keep:star＞", "<keep：star>", "<keep:star＞", "＜erase：star：0.5＞", "〈keep:star〉", "《keep:star》", "< keep:star>",
        "</keep:star>",
        "<keep=star>", "&lt;keep:star&gt;", "\\<keep:star\\>", "<erase:<lora:x:1>>", "<erase:star:1\n<lora:x:1>", "<keep:star:>",
        "[<erase:star>:0.5]", "[:<erase:star>:0.5]", "[<erase:star>:<keep:star>:0.5]", "[star|<keep:star>]",
        "<er<keep:x>ase:star>",
    ],
)  # fmt: skip
def test_a_tag_that_is_not_understood_is_refused(tag: str) -> None:
    """Never drawn as words, never dropped: one sentence that names the tag."""
    with pytest.raises(SepMEError) as refusal:
        parse_tags(f"a cat, {tag}")
    assert "keep" in str(refusal.value) or "erase" in str(refusal.value)
    assert "star" in str(refusal.value) or "star" not in tag
    assert len(str(refusal.value)) < 250


def test_toggles_of_the_command_line() -> None:
    assert parse_toggle("star") == {"star": 1.0}
    assert parse_toggle(" van gogh : 0.7") == {"van gogh": 0.7}
    for bad in ("star:0.5:1", "star:", ":1", "", "star:much", "a>b", "star:nan", "star>:1"):
        with pytest.raises(SepMEError):
            parse_toggle(bad)


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


def test_strengths_by_label_file_and_hash(make_random_delta: Callable[..., ConceptDelta], tmp_path: Path) -> None:
    shapes = {f"middle_block.1.transformer_blocks.0.attn2.to_{p}": (8, 64) for p in "kv"}
    star, gogh = (make_random_delta(n, shapes, seed=i) for i, n in enumerate(("star", "van gogh")))
    gogh = ConceptDelta.load(gogh.save(tmp_path / "sub" / "Mine.safetensors"))
    digest = gogh.content_hash()
    for name in ("Van  Gogh", f"van gogh [{digest[:10]}]", "mine.safetensors", "sub/mine", "sub\\Mine", "van-gogh.safetensors", digest):
        assert strengths([{name: 0.5}], [star, gogh]).tolist() == [[1.0, 0.5]]
    for name in (f"van gogh [{'0' * 10}]", f"star [{digest[:10]}]", "ine", "gogh", digest[:5]):
        with pytest.raises(SepMEError, match="no concept"):
            strengths([{name: 0.5}], [star, gogh])


def test_the_last_toggle_wins_however_it_names_the_concept() -> None:
    toggles = merge({"star.safetensors": 1.0}, {"star": 0.0}, {"STAR.safetensors": 0.5})
    assert strengths([toggles], ["star"]).tolist() == [[0.5]]


def test_strengths_of_unknown_concepts() -> None:
    with pytest.raises(SepMEError, match=r"no concept 'sun' here; loaded concepts: star, moon\."):
        strengths([{"sun": 1.0}], ["star", "moon"])
    with pytest.raises(SepMEError, match="loaded concepts: none"):
        strengths([{"sun": 1.0}], [])
