"""Names become erasures: anchors and neighbours found among the shipped words, sets kept in memory and on disk, presets planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyEncoder

from sepme.apply.composition import Composition
from sepme.concepts import Concept
from sepme.delta.library import embed, unembed
from sepme.errors import SepMEError
from sepme.plan.said import Said
from sepme.plan.vocabulary import Vocabulary, kinds, nearby_words
from sepme.presets import Preset, presets
from sepme.train import erasures
from sepme.train.again import made_again
from sepme.train.erasures import Erasures, Named, book_of, named, neighbours


@pytest.fixture(scope="module")
def encoder() -> TinyEncoder:
    return TinyEncoder(d_in=96)


def edited(deltas: Any, encoder: TinyEncoder, prompt: str) -> bool:
    context = encoder.encode([prompt]).context
    return Composition(tuple(deltas)).edit_context(context, torch.ones(len(deltas))) is not context


@pytest.mark.parametrize(
    ("name", "anchor"),
    [
        ("star", "a shape"),
        ("red star", "a red shape"),
        ("old metal sword", "an old metal object"),
        ("Van Gogh", "a picture"),
        ("golden retriever dog", "a golden animal"),  # retriever is no adjective
        ("apple", "food"),
    ],
)
def test_anchor_is_the_broader_thing(encoder: TinyEncoder, name: str, anchor: str) -> None:
    assert Vocabulary.of(encoder).anchor(encoder, name) == anchor


def test_anchor_of_what_is_not_listed(encoder: TinyEncoder) -> None:
    """It is of the kind of its nearest word, and never holds the concept itself."""
    found = Vocabulary.of(encoder).anchor(encoder, "a thing that nobody knows")
    assert found in {a for kind in kinds()[0] for a in kind.anchors}
    assert "picture" not in Vocabulary.of(encoder).anchor(encoder, "picture")


def test_words_in_pieces_are_none(encoder: TinyEncoder) -> None:
    """An encoder that reads every word but one letter by letter knows that one alone."""

    class Spelling(TinyEncoder):
        def encode(self, prompts: Any) -> Any:
            known = {"star", "a", "picture"}
            return super().encode([" ".join(w if w in known else " ".join(w) for w in p.split()) for p in prompts])

    vocabulary = Vocabulary(Spelling(tokens=40))
    assert vocabulary.words == ("star",)
    assert vocabulary.anchor(Spelling(tokens=40), "star") == "a picture"
    assert vocabulary.nearby(Spelling(tokens=40), "heart") == ["star"]


def test_neighbours_share_no_word_with_concepts(encoder: TinyEncoder) -> None:
    found = nearby_words(encoder, "star", ("a bear on a chair",), count=500)
    assert len(found) == len(set(found)) > 300
    assert not {"star", "bear", "chair"} & set(found)
    values = Vocabulary.of(encoder).similarities(encoder, "star")
    place = {w: float(v) for w, v in zip(Vocabulary.of(encoder).words, values, strict=True)}
    assert [place[w] for w in found] == sorted((place[w] for w in found), reverse=True)
    assert len(nearby_words(encoder, "star")) == 32


def test_kinds_are_well_formed() -> None:
    found, adjectives = kinds()
    assert "red" in adjectives
    words = [w for kind in found for w in kind.examples]
    assert len(words) == len(set(words)) > 400
    assert all("a picture" in kind.anchors for kind in found)  # what every encoder knows


def test_book_has_what_was_given_and_what_was_found(encoder: TinyEncoder) -> None:
    book = book_of(encoder, [Named("star"), Named("heart", ("a heart",), "a circle"), Named("moon", anchor="")])
    assert [(c.name, c.anchor) for c in book.concepts] == [("heart", "a circle"), ("moon", ""), ("star", "a shape")]
    assert book_of(encoder, [Named("star", anchor="")], ["a cat", "a cat"]).preserve == ("a cat",)


def test_gates_are_calibrated_on_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of encoders that are asked for no words: those that stand in no prompt of the concepts are read beside the ordinary ones, once for
    either half."""
    encoder = TinyEncoder(d_in=96)
    monkeypatch.setattr(encoder, "free_length", True, raising=False)
    monkeypatch.setattr(erasures, "ordinary_prompts", lambda: ("a cat", "a dog"))
    book = book_of(encoder, [Named("star"), Named("heart", ("a heart", "a moon"))])
    found = neighbours(encoder, book, ["heart", "star"])
    near = list(dict.fromkeys([*found["heart"], *found["star"]]))
    assert len(near) == len(set(near)) > 32
    assert not {"star", "heart", "moon"} & set(near)
    encoder.calls.clear()
    Erasures().get(encoder, [Named("star"), Named("heart", ("a heart", "a moon"))])
    assert [c for c in encoder.calls if "a cat" in c] == [["a cat", *near]]
    assert [c for c in encoder.calls if "a dog" in c] == [["a dog", *near]]


def test_many_are_planned_in_mode_soft(encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasures, "MANY", 2)
    assert [d.certificate.mode for d in Erasures().get(encoder, ["star", "heart"])] == ["soft", "soft"]


def test_words_near_a_concept_are_found_and_what_is_said_of_them_counts(encoder: TinyEncoder) -> None:
    """What must stay is preserved and measured, what means the same changes along, what is free is neither; a file says all of it."""
    made, plain = Erasures(), Erasures().get(encoder, ["star"])[0]
    near = plain.facts.nearby.near
    assert len(near) == len(set(near)) > 20
    assert "star" not in near
    assert plain.certificate.collateral is not None
    assert plain.certificate.collateral.of == 100
    first, second, third = near[:3]
    row = Named("star", said=Said(("heirloom",), (first,), (second,)))
    delta = made.get(encoder, [row])[0]
    assert delta.facts.nearby.near[:2] == ("heirloom", third)
    assert not {first, second} & set(delta.facts.nearby.near)
    assert delta.concept.prompts == (*Concept("star").prompts, first)
    assert edited([delta], encoder, first)
    assert not edited([delta], encoder, "heirloom")
    assert delta.preserve.prompts == ("heirloom",)
    assert unembed(embed(delta)).facts.nearby.said == row.said
    assert made_again(encoder, None, delta, ["a cup"]).facts.nearby.said == row.said
    encoder.calls.clear()
    assert made.get(encoder, [row])[0] is delta
    assert all(len(c) == 3 for c in encoder.calls)  # its fingerprint
    with pytest.raises(SepMEError, match="'moon' is in two lists"):
        made.get(encoder, [Named("star", said=Said(stays=("moon",))), Named("tree", said=Said(free=("moon",)))])


def test_a_set_is_made_once_in_any_order(encoder: TinyEncoder, tmp_path: Path) -> None:
    made = Erasures(lambda: tmp_path)
    star, heart = made.get(encoder, ["star", "heart"])
    assert (star.concept.name, heart.concept.name) == ("star", "heart")
    assert all(edited([d], encoder, f"a {d.concept.name}") for d in (star, heart))
    assert not edited([star, heart], encoder, "")
    encoder.calls.clear()
    again = made.get(encoder, ["heart", "star"])
    assert again == (heart, star)
    assert [len(c) for c in encoder.calls] == [3]  # its fingerprint
    fresh = Erasures(lambda: tmp_path).get(encoder, ["star", "heart"])
    assert [d.content_hash() for d in fresh] == [star.content_hash(), heart.content_hash()]
    assert all(len(c) == 3 for c in encoder.calls)
    alone = made.get(encoder, ["star"])[0]
    assert alone.content_hash() != star.content_hash()
    assert {c.name for c in star.known} == {"heart"}


@pytest.mark.parametrize("damage", [b"", b"[", b"[1]", b'["AAAA"]', b"{}"])
def test_a_damaged_file_is_made_again(encoder: TinyEncoder, tmp_path: Path, damage: bytes) -> None:
    (made,) = Erasures(lambda: tmp_path).get(encoder, ["moon"], ["a cat"])
    (path,) = tmp_path.glob("*.json")
    good = path.read_bytes()
    path.write_bytes(damage)
    assert Erasures(lambda: tmp_path).get(encoder, ["moon"], ["a cat"])[0].content_hash() == made.content_hash()
    assert path.read_bytes() == good


def test_the_disk_is_bounded(encoder: TinyEncoder, tmp_path: Path) -> None:
    names = ["star", "heart", "moon"]
    whole = Erasures(lambda: tmp_path)
    for name in names:
        whole.get(encoder, [name], ["a cat"])
    sizes = sorted(p.stat().st_size for p in tmp_path.glob("*.json"))
    bounded = Erasures(lambda: tmp_path, limit=sizes[-1] + sizes[-2])
    bounded.get(encoder, ["tree"], ["a cat"])
    left = list(tmp_path.glob("*.json"))
    assert 1 <= len(left) <= 2
    assert sum(p.stat().st_size for p in left) <= sizes[-1] + sizes[-2] + 500
    for path in left:
        path.unlink()
    assert bounded.get(encoder, ["tree"], ["a cat"])[0].concept.name == "tree"


def test_a_folder_that_cannot_be_written_is_no_error(encoder: TinyEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Erasures(lambda: tmp_path / "file").get(encoder, ["moon"], ["a cat"])[0].concept.name == "moon"


def test_names_that_are_none() -> None:
    with pytest.raises(SepMEError, match="empty name"):
        named([" "])
    with pytest.raises(SepMEError, match="listed twice"):
        Erasures().get(TinyEncoder(), ["star", "Star"], ["a cat"])
    assert named([Concept("star", anchor="")])[0].anchor == ""


@pytest.mark.parametrize("preset", presets(), ids=lambda p: p.key)
def test_presets_are_planned(preset: Preset) -> None:
    """All of its concepts at once; each is edited by its own erasure, and what it preserves is not."""
    encoder = TinyEncoder(d_in=768, tokens=10)
    made = Erasures().get(encoder, preset.book.concepts, preset.book.preserve)
    assert len(made) == len(preset.book.concepts)
    for delta in made:
        assert sum(edited([delta], encoder, p) for p in delta.concept.prompts) >= 0.9 * len(delta.concept.prompts), delta.concept.name
    assert not any(edited(made, encoder, p) for p in preset.book.preserve)


def test_a_preset_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("concepts: [star]\n")
    with pytest.raises(SepMEError, match="does not begin with"):
        Preset.load(path)
    assert {p.key for p in presets() if p.whole} == {"nudity", "violence"}
