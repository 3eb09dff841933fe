"""Concepts and concept books: what is accepted, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepme.concepts import MAX_BOOK_BYTES, MAX_NAME, MAX_PROMPT, TEMPLATES, Concept, ConceptBook, mentions, normalised
from sepme.errors import SepMEError

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>:"), min_size=1, max_size=30).filter(str.strip)
PROMPTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60).filter(str.strip)


def test_a_bare_name_means_the_templates() -> None:
    concept = Concept("  Van Gogh ")
    assert concept.name == "Van Gogh"
    assert concept.prompts == tuple(t.format("Van Gogh") for t in TEMPLATES)
    assert concept.anchor == ""


def test_prompts_are_stripped_and_unique() -> None:
    assert Concept("a", (" x ", "x", "y")).prompts == ("x", "y")
    assert Concept("a", ("x",), " painting ").anchor == "painting"


def test_braces_in_names_are_plain_text() -> None:
    assert Concept("{0} {x}").prompts[0] == "{0} {x}"


@pytest.mark.parametrize(
    ("name", "prompts", "anchor", "message"),
    [
        ("", (), "", "empty name"),
        ("  ", (), "", "empty name"),
        (3, (), "", "empty name"),
        ("a<b", (), "", "characters < > :"),
        ("a:b", (), "", "characters < > :"),
        ("a\nb", (), "", "characters < > :"),
        ("x" * (MAX_NAME + 1), (), "", "too long"),
        ("a", ("x" * (MAX_PROMPT + 1),), "", "characters; keep it under"),
        ("a", ("x",), "y" * (MAX_PROMPT + 1), "characters; keep it under"),
        ("a", ("x", "  "), "", "empty prompt"),
        ("a\ud800", (), "", "not valid text"),
        ("a", ("x\udfff",), "", "not valid text"),
        ("a", ("x",), "\ud800", "not valid text"),
    ],
)
def test_bad_concepts(name: object, prompts: tuple[str, ...], anchor: str, message: str) -> None:
    with pytest.raises(SepMEError, match=message):
        Concept(name, prompts, anchor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("a STAR, please", "star", True),
        ("starfish", "star", False),
        ("rock-star", "star", True),
        ("by  Vincent\tvan Gogh", "van gogh", True),
        ("vincentvan gogh", "van gogh", False),
        ("written in c++ today", "c++", True),
        ("a.b", "a.b", True),
        ("axb", "a.b", False),
    ],
)
def test_mentions_looks_for_whole_words(text: str, name: str, expected: bool) -> None:
    assert mentions(text, name) is expected


@given(PROMPTS)
def test_normalised_is_idempotent(text: str) -> None:
    assert normalised(" " + normalised(text) + "\t") == normalised(normalised(text))


def test_book_finds_concepts_by_any_case() -> None:
    book = ConceptBook((Concept("Van Gogh"), Concept("star")))
    assert book["van  GOGH"] is book.concepts[0]
    with pytest.raises(SepMEError, match=r"no concept 'moon' here; known concepts: Van Gogh, star\."):
        book["moon"]


def test_overlapping_names_are_found() -> None:
    book = ConceptBook((Concept("painting"), Concept("oil painting"), Concept("star")))
    assert book.overlaps() == [("painting", "oil painting")]


@pytest.mark.parametrize(
    ("concepts", "preserve", "message"),
    [
        ((Concept("star"), Concept("STAR", ("x",))), (), "listed twice"),
        ((Concept("star", ("one",)), Concept("moon", ("ONE",))), (), r"'ONE' of concept 'moon' also belongs to concept 'star'"),
        ((Concept("star", ("one", "two")),), ("Two ",), r"'two' of concept 'star' also belongs to the preserve list"),
    ],
)
def test_contradictory_books(concepts: tuple[Concept, ...], preserve: tuple[str, ...], message: str) -> None:
    with pytest.raises(SepMEError, match=message):
        ConceptBook(concepts, preserve)


def test_parse_forms() -> None:
    text = """
concepts:
  - van gogh
  - name: star
    prompts: [a star, "stars"]
    anchor: shape
preserve:
  - the logo
"""
    book = ConceptBook.loads(text)
    assert book.concepts == (Concept("van gogh"), Concept("star", ("a star", "stars"), "shape"))
    assert book.preserve == ("the logo",)
    assert ConceptBook.loads("- a\n- b") == ConceptBook((Concept("a"), Concept("b")))
    assert ConceptBook.loads('{"concepts": [{"name": "a", "prompts": null, "anchor": null}]}') == ConceptBook((Concept("a"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of concepts"),
        ("star", "no list of concepts"),
        ("concepts: star", "no list of concepts"),
        ("concepts: []", "no list of concepts"),
        ("- 3", "no text"),
        ("- null", "no text"),
        ("- [a]", "no text"),
        ("- {name: a, anchor: 3}", "no text"),
        ("{concepts: [a], preserved: [b]}", "unknown key 'preserved'; known keys here: concepts, preserve"),
        ("- {name: a, prompt: b}", "unknown key 'prompt'"),
        ("- {name: a, prompts: b}", "The prompts of 'a' in the concept book must be a list"),
        ("- {name: a, prompts: [1]}", "must be a list"),
        ("{concepts: [a], preserve: {b: c}}", "The preserve list of the concept book must be a list"),
        ("concepts:\n  - 'a", "not readable YAML or JSON at line 2"),
        ("- &x a\n- *x", "not readable"),
        ("!!python/object/apply:os.system [ls]", "not readable"),
        ("- " + "[" * 10000, "not readable"),
        ("\x00", "not readable"),
        ("- 2001-99-99", "not readable"),
        ('- !!int ""', "not readable"),
        ("- 0x" + "f" * 6000, "not readable"),
        ("- 1" + ":1" * 300 + ".0", "not readable"),
        ("- 1" + ":1" * 100000, "not readable"),
        ("- {name: a, prompts: !!set {b, c}}", "must be a list"),
        ('- !!bool "x"', "not readable"),
        ('- !!timestamp "x"', "not readable"),
        ("x" * (MAX_BOOK_BYTES + 1), "larger than 1 MB"),
    ],
)
def test_bad_books(text: str, message: str) -> None:
    with pytest.raises(SepMEError, match=message):
        ConceptBook.loads(text)


@given(st.text(max_size=60) | st.text("-[]{}:,&*!|>'\"#%@ \nab1~<", max_size=40))
def test_any_text_is_a_book_or_an_error(text: str) -> None:
    try:
        book = ConceptBook.loads(text)
    except SepMEError as error:
        assert "\n" not in str(error)
    else:
        assert book.concepts


@given(st.lists(st.tuples(NAMES, st.lists(PROMPTS, max_size=3), PROMPTS), min_size=1, max_size=4), st.lists(PROMPTS, max_size=3))
def test_dumps_round_trip(entries: list[tuple[str, list[str], str]], preserve: list[str]) -> None:
    try:
        book = ConceptBook(tuple(Concept(n, tuple(p), a) for n, p, a in entries), tuple(preserve))
    except SepMEError:
        return  # contradictory draws have their own tests
    assert ConceptBook.parse(json.loads(book.dumps())) == book


def test_json_that_yaml_cannot_read(tmp_path: Path) -> None:
    """Tabs as indentation, escaped emoji (our own ``dumps``), a byte order mark."""
    book = ConceptBook((Concept("😀", ("😀 smile", "C++")),), ("🎨",))
    assert ConceptBook.loads(book.dumps()) == book
    assert ConceptBook.loads('{\n\t"concepts": [\n\t\t"star"\n\t]\n}').concepts == (Concept("star"),)
    for name, text in (("a.json", '["star"]'), ("b.yaml", "concepts:\n- star\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert ConceptBook.load(tmp_path / name).concepts == (Concept("star"),)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("concepts: [star]\nconcepts: [moon]", "concepts"),
        ("concepts: [star]\npreserve: [cat]\npreserve: [dog]", "preserve"),
        ("- name: star\n  prompts: [star]\n  prompts: [a star]", "prompts"),
        ('{"concepts": ["star"], "preserve": ["cat"], "preserve": ["dog"]}', "preserve"),
        ('[{"name": "star", "prompts": ["star"], "prompts": ["a star"]}]', "prompts"),
    ],
)
def test_what_is_written_twice_is_said(text: str, key: str) -> None:
    """The first of the two would be lost."""
    with pytest.raises(SepMEError, match=f"has '{key}' twice"):
        ConceptBook.loads(text)


def test_load_reads_files(tmp_path: Path) -> None:
    path = tmp_path / "book.yaml"
    path.write_text("- ünï\n- star\n", encoding="utf-8")
    assert [c.name for c in ConceptBook.load(path).concepts] == ["ünï", "star"]
    path.write_text("- 3\n")
    with pytest.raises(SepMEError, match=r"book\.yaml has a concept"):
        ConceptBook.load(path)


def test_load_refuses_what_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(SepMEError, match=r"missing\.yaml cannot be read \(No such file"):
        ConceptBook.load(tmp_path / "missing.yaml")
    with pytest.raises(SepMEError, match=r"cannot be read \(Is a directory\)"):
        ConceptBook.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"- \xff\xfe\x00")
    with pytest.raises(SepMEError, match="not a text file"):
        ConceptBook.load(tmp_path / "binary")


def test_a_book_finds_its_preserve_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "book.yaml").write_text("concepts: [a, b]\npreserve_file: preserved.txt\n", encoding="utf-8")
    loaded = ConceptBook.load(tmp_path / "book.yaml")
    assert loaded.preserve_file == str(tmp_path / "preserved.txt")
    assert ConceptBook.loads(loaded.dumps()) == loaded
