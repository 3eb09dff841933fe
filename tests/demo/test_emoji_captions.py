"""Captions of the emoji world: they say what the scene shows, repeat, and hold only words that the tokenizer knows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sepme.demo.emoji.captions import FILLER, Lexicon, caption_of, load_words, random_caption, with_article, words_of
from sepme.demo.emoji.data import BACKGROUND_NAMES
from sepme.demo.emoji.text import build_tokenizer, byte_pairs, load_tokenizer
from sepme.demo.emoji.things import STYLES, THINGS, name_of

CAT, DOG, CAR = (THINGS.index(t) for t in ("cat", "dog", "automobile"))


@pytest.fixture(scope="module")
def words() -> Lexicon:
    keywords: list[list[str]] = [[] for _ in THINGS]
    keywords[CAT] = ["cat", "kitten", "pet", "animal", "red", "noto"]
    keywords[DOG] = ["dog", "pet", "animal", "Puppy", "cat"]
    keywords[CAR] = ["automobile", "vehicle"]
    return words_of(keywords)


def test_keywords_become_synonyms_and_kinds(words: Lexicon) -> None:
    assert words.synonyms[CAT] == ["kitten"]  # "red" is a background, "noto" a studio, "cat" its name
    assert words.synonyms[DOG] == ["puppy"]  # "cat" is another thing's name
    assert words.synonyms[CAR] == ["automobile", "vehicle"]  # captions call it a car
    assert words.kinds == {"animal": [CAT, DOG], "pet": [CAT, DOG]}


def test_captions_say_what_the_scene_shows(words: Lexicon) -> None:
    generator = torch.Generator().manual_seed(1)
    kinds: Counter[str] = Counter()
    for _ in range(3000):
        text, scene = random_caption(words, generator, things=100)
        assert 0 <= scene.thing < 100
        if not text:
            kinds["empty"] += 1
            continue
        bare = text
        for filler in FILLER:
            bare = bare.removesuffix(f", {filler}").removeprefix(f"{filler}, ")
        named = [w for w in BACKGROUND_NAMES if bare.endswith((f"a {w} background", f"an {w} background", f", {w} background"))]
        assert named == ([BACKGROUND_NAMES[scene.ground]] if named else [])
        assert named or scene.ground == 0
        styles = [s for s in STYLES if s in bare.replace(",", "").split()]
        assert styles in ([], [STYLES[scene.style]])
        nouns = [name_of(THINGS[scene.thing]), *words.synonyms[scene.thing]]
        thing = any(n in bare for n in nouns)
        kinds["thing" * thing + "style" * bool(styles)] += 1
    assert 220 < kinds["empty"] < 390
    assert kinds["thingstyle"] > 1200
    assert kinds["thing"] > 450
    assert kinds["style"] > 200


def test_captions_repeat(words: Lexicon) -> None:
    once, again = ([random_caption(words, g) for _ in range(50)] for g in (torch.Generator().manual_seed(3) for _ in range(2)))
    assert once == again


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("apple", "an apple"),
        ("rocket", "a rocket"),
        ("french fries", "french fries"),
        ("bus", "a bus"),
        ("dress", "a dress"),
        ("bread", "bread"),
    ],
)
def test_articles(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def test_caption_of_every_kind() -> None:
    assert caption_of("cat", "noto", "", 0) == "a cat by noto"
    assert caption_of("cat", "openmoji", "", 2) == "an openmoji cat"
    assert caption_of("cat", "", "orange", 0) == "a cat on an orange background"
    assert caption_of("", "glossy", "blue", 1) == "glossy style, blue background"
    assert caption_of() == "a picture"


def test_every_word_is_one_token_and_captions_fit(words: Lexicon, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, words.vocabulary)
    for word in words.vocabulary:
        if word.isalpha():
            assert len(tokenizer(word).input_ids) == 3, word
    generator = torch.Generator().manual_seed(2)
    lengths = [len(tokenizer(random_caption(words, generator)[0]).input_ids) for _ in range(3000)]
    assert max(lengths) <= 24  # what training encodes for most of its steps
    assert tokenizer("A Cat by NOTO").input_ids == tokenizer("a cat by noto").input_ids
    assert len(tokenizer("zeppelins").input_ids) > 3


def test_the_tokenizer_is_the_same_every_time(words: Lexicon, tmp_path: Path) -> None:
    for name in ("one", "other"):
        build_tokenizer(tmp_path / name, words.vocabulary[::-1] if name == "other" else words.vocabulary)
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert load_tokenizer(tmp_path / "one")("a cat").input_ids == load_tokenizer(tmp_path / "other")("a cat").input_ids


def test_byte_pairs_take_the_most_frequent_first() -> None:
    assert byte_pairs(["aab", "aac"]) == [("a", "a"), ("aa", "b</w>"), ("aa", "c</w>")]


def test_words_survive_a_file(words: Lexicon, tmp_path: Path) -> None:
    words.save(tmp_path / "words.json")
    assert load_words(tmp_path / "words.json") == words
