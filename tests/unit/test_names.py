"""Lists of names that people type, and file names of concepts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepme.concepts import file_name, normalised, reserved, split_names
from sepme.errors import SepMEError

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("star", ["star"]),
        ("star, van gogh\nheart,", ["star", "van gogh", "heart"]),
        ('"Cruise, Tom", star', ["Cruise, Tom", "star"]),
        ("“Cruise, Tom”,star", ["Cruise, Tom", "star"]),
        ('"Weird Al" Yankovic, star', ['"Weird Al" Yankovic', "star"]),
        ('"""Weird Al"" Yankovic, Jr."', ['"Weird Al" Yankovic, Jr.']),
        ("Georgia O'Keeffe, 'Tis, 6\" nails", ["Georgia O'Keeffe", "'Tis", '6" nails']),
        (" , ,, \n", []),
        ('star, ""', ["star"]),
    ],
)
def test_typed_lists(text: str, names: list[str]) -> None:
    assert split_names(text) == names


@pytest.mark.parametrize("text", ['"Cruise, Tom', 'star, "Cruise, Tom', "“Cruise, Tom"])
def test_a_quote_that_is_not_closed(text: str) -> None:
    with pytest.raises(SepMEError, match="is not closed"):
        split_names(text)


@given(st.lists(NAMES, max_size=5), st.sampled_from([",\n", "+", "+,"]))
def test_quoted_names(names: list[str], separators: str) -> None:
    quoted = ('"{}"'.format(name.replace('"', '""')) for name in names)
    assert split_names(separators[0].join(quoted), separators) == names


def test_composed_and_decomposed_letters_are_the_same_name() -> None:
    assert normalised("Beyonce\u0301") == normalised("BEYONC\u00c9")


OLD = {"star": "star", "Van  Gogh": "van-gogh", "spider-man": "spider-man", "oil_painting 2": "oil_painting-2", "漢字": "漢字"}


@pytest.mark.parametrize(("name", "file"), OLD.items())
def test_plain_names_keep_their_files(name: str, file: str) -> None:
    assert file_name(name) == file


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("C++", "C#"), ("😀", "🎨"), ("कि", "की"), ("star+", "star#"), ("star", "star!"), ("C", "C++"), ("a, b", "a b"), ("con", "con."),
        ("x" * 128, "x" * 127), ("漢" * 128, "漢" * 127), ("...", ".."), ("???", "!!!"), ("a/b", "a\\b"), ("star ★", "star ☆"),
    ],
)  # fmt: skip
def test_two_concepts_have_two_files(one: str, other: str) -> None:
    assert file_name(one) != file_name(other)
    assert file_name(one) == file_name(f" {one.upper()} ")
    for name in (one, other):
        assert re.fullmatch(r"[\w-]+", file_name(name))
        assert len(file_name(name).encode()) <= 200


@pytest.mark.parametrize("name", ["con", "CON", "nul", "Aux", "prn", "com1", "LPT9", "com¹", "a.", "nul.txt"])
def test_windows_can_hold_every_file(name: str) -> None:
    assert not reserved(file_name(name))
    assert reserved(name)


@given(NAMES, NAMES)
def test_file_names_tell_concepts_apart(one: str, other: str) -> None:
    alike = [normalised(name).replace(" ", "-") for name in (one, other)]
    assert (file_name(one) == file_name(other)) == (alike[0] == alike[1] or normalised(one) == normalised(other))
