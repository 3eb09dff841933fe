"""SepME Erase: names become erasures on first use; switches, strengths and their order make nothing anew."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from comfyui.inside import PACK, Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")


class Out(NamedTuple):
    model: Any
    deltas: Any
    facts: Any


@pytest.fixture
def erase(inside: Inside, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    """``erase(rows, ...)``: the node's outputs and facts; ``erase.reads``: every list of prompts that the text encoder read."""
    node = importlib.import_module(f"{PACK}.nodes.erase").SepMEErase
    erasures = importlib.import_module(f"{PACK}.sepme.train.erasures").Erasures
    text = importlib.import_module(f"{PACK}.nodes.host.text")
    monkeypatch.setattr(inside.host, "erasures", erasures(lambda: tmp_path))
    reads: list[Any] = []
    read = text.ClipEncoder._read
    monkeypatch.setattr(text.ClipEncoder, "_read", lambda self, prompts: reads.append(prompts) or read(self, prompts))

    def run(rows: Any, **more: Any) -> Any:
        value = rows if isinstance(rows, str) else json.dumps(rows)
        with torch.inference_mode():
            out = node.execute(inside.model, inside.clip, value, **more)
        return Out(*out.result, out.ui["sepme_made"])

    run.reads = reads  # type: ignore[attr-defined]
    return run


def test_a_name_is_enough(inside: Inside, erase: Any) -> None:
    stock, kept = (inside.sample(inside.model, inside.text(p)) for p in ("a penguin", "a tulip"))
    made = erase([{"name": "penguin"}])
    assert not torch.equal(inside.sample(made.model, inside.text("a penguin")), stock)
    assert torch.equal(inside.sample(made.model, inside.text("a tulip")), kept)
    assert torch.equal(inside.sample(inside.model, inside.text("a penguin")), stock)
    assert made.facts[0]["anchor"] == "an animal"
    assert made.facts[0]["collateral"] == {"count": 0, "of": 99, "worst": ()}
    assert made.facts[0]["near"][:2] == ["cross", "church"]
    assert made.deltas[0].recipe.plan["mode"] == "tolerance"


def test_switches_strengths_and_order_read_nothing(inside: Inside, erase: Any) -> None:
    rows = [{"name": "star"}, {"name": "twemoji"}]
    first = erase(rows)
    assert erase.reads
    erase.reads.clear()
    again = [
        erase([{"name": "star", "on": False}, {"name": "twemoji"}]),
        erase([{"name": "twemoji", "strength": 0.5}, {"name": "star", "strength": -1, "on": True}]),
        erase("twemoji, star"),
    ]
    assert erase.reads == []
    assert all({id(d) for d in a.deltas} == {id(d) for d in first.deltas} for a in again)
    stock = inside.sample(inside.model, inside.text("a star"))
    assert torch.equal(inside.sample(again[0].model, inside.text("a star")), stock)
    erase([*rows, {"name": "tulip"}])
    assert erase.reads  # another set is planned together


def test_the_next_server_reads_the_set_from_disk(inside: Inside, erase: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = erase("star")
    assert first.deltas[0].recipe.plan["mode"] == "soft"  # which does less wrong
    erase.reads.clear()
    monkeypatch.setattr(inside.host, "erasures", type(inside.host.erasures)(lambda: tmp_path))
    assert [d.content_hash() for d in erase("star").deltas] == [d.content_hash() for d in first.deltas]
    assert erase.reads == []


def test_beside_deltas_and_saved_rows(inside: Inside, erase: Any) -> None:
    (star, openmoji) = inside.deltas
    folder = inside.host.delta_library
    path = folder.save(star)
    row = {"name": "star", "file": path.name, "content_hash": star.content_hash()}
    made = erase([row, {"name": "tulip"}], deltas=(openmoji,))
    assert [d.concept.name for d in made.deltas] == ["openmoji", "star", "tulip"]
    assert {c.name for c in made.deltas[2].known} == {"openmoji", "star"}
    with pytest.raises(ValueError, match="among the deltas"):
        erase("openmoji", deltas=(openmoji,))
    with pytest.raises(ValueError, match="erases 'star', not 'moon'"):
        erase([row | {"name": "moon"}])
    path.unlink()
    with pytest.raises(ValueError, match="not in models/sepme"):
        erase([row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[]", "No concept is named"),
        ("", "No concept is named"),
        ([{"name": " "}], "A row has no name"),
        ([{}], "A row has no name"),
        ("[1]", "cannot be read"),
        ('{"name": "star"}', "cannot be read"),
        ("[{", "cannot be read"),
        ([{"name": "star"}, {"name": "Star "}], "in two rows"),
        ([{"name": "a<b"}], "characters < > :"),
        ([{"name": "star", "strength": "1"}], "no number between"),
        ([{"name": "star", "strength": 1e9}], "no number between"),
        ([{"name": "star", "prompts": "a star"}], "no text"),
        ([{"name": "star", "anchor": 3}], "no text"),
        ([{"name": "star", "prompts": [""]}], "empty prompt"),
        ([{"name": "star", "stays": "moon"}], "no text"),
        ([{"name": "star", "free": [3]}], "no text"),
        ([{"name": "star", "stays": ["moon"]}, {"name": "tulip", "same": ["Moon"]}], "'moon' is in two lists"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(erase: Any, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        erase(rows)
    assert "\n" not in str(error.value)


def test_prompts_anchor_and_preserve_of_ones_own(inside: Inside, erase: Any) -> None:
    rows = [{"name": "red star", "prompts": ["a red star", "one red star"], "anchor": "a church"}]
    (delta,) = erase(rows, preserve="a blue star\n\na tulip\n").deltas
    assert delta.concept == inside.sepme.Concept("red star", ("a red star", "one red star"), "a church")
    assert delta.preserve.prompts == ("a blue star", "a tulip")


def test_words_of_ones_own(erase: Any) -> None:
    """What a row says of words near its concept makes the erasure anew, and a shared workflow says the same."""
    row = {"name": "star", "stays": ["cloud"], "same": ["airplane"], "free": ["cactus"]}
    made = erase([row])
    assert made.facts[0]["near"][0] == "cloud"
    assert not {"cactus", "airplane"} & set(made.facts[0]["near"])
    assert made.facts[0]["synonyms"][-1] == "airplane"  # after those that were found
    assert "airplane" in made.deltas[0].concept.prompts
    assert made.facts[0]["preserve"] == ["cloud"]
