"""Delta files in model folders: listing, finding, saving, travelling as text."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.library import MAX_EMBEDDED, DeltaLibrary, embed, resolve, unembed
from sepme.errors import SepMEError

SHAPES = {f"middle_block.1.transformer_blocks.0.attn2.to_{p}": (8, 64) for p in "kv"}


@pytest.fixture
def star(make_random_delta: Callable[..., ConceptDelta]) -> ConceptDelta:
    return make_random_delta("van gogh", SHAPES, seed=1, kv_fingerprint="abcd")


@pytest.fixture
def other(make_random_delta: Callable[..., ConceptDelta]) -> ConceptDelta:
    return make_random_delta("van gogh", SHAPES, seed=2)


def test_entries(tmp_path: Path, star: ConceptDelta, other: ConceptDelta) -> None:
    """Deltas only, of all folders; of equal names the first folder's counts; a folder that is not there is empty."""
    first, second = tmp_path / "a", tmp_path / "b"
    library = DeltaLibrary(lambda: [first, second, tmp_path / "none"])
    assert library.entries() == []
    star.save(first / "x.safetensors")
    other.save(second / "x.safetensors")
    other.save(second / "sub" / "y.safetensors")
    (second / "no delta.safetensors").write_bytes(b"no delta")
    (second / "notes.txt").write_text("no delta")
    assert [(e.name, e.content_hash) for e in library.entries()] == [
        ("sub/y.safetensors", other.content_hash()),
        ("x.safetensors", star.content_hash()),
    ]
    entry = library.entries()[1]
    assert (entry.concept, entry.architecture, entry.kv_fingerprint) == ("van gogh", star.architecture, "abcd")


def test_headers_are_read_once_until_a_file_changes(
    tmp_path: Path, star: ConceptDelta, other: ConceptDelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sepme.delta.library

    reads: list[Path] = []
    read = sepme.delta.library.read_header
    monkeypatch.setattr(sepme.delta.library, "read_header", lambda path: (reads.append(path), read(path))[1])
    library = DeltaLibrary(lambda: [tmp_path])
    path = star.save(tmp_path / "x.safetensors")
    for _ in range(3):
        assert library.entries()[0].content_hash == star.content_hash()
    assert len(reads) == 1
    other.save(path)
    os.utime(path, ns=(1, 1))
    assert library.entries()[0].content_hash == other.content_hash()
    assert len(reads) == 2


def test_found_by_name_or_by_hash(tmp_path: Path, star: ConceptDelta, other: ConceptDelta) -> None:
    library = DeltaLibrary(lambda: [tmp_path])
    star.save(tmp_path / "sub" / "renamed.safetensors")
    other.save(tmp_path / "star.safetensors")
    for name in ("sub/renamed.safetensors", "sub\\renamed.safetensors"):
        assert library.find(name) == [tmp_path / "sub" / "renamed.safetensors"]
    loaded = library.load("star.safetensors", star.content_hash())  # the name is another's
    assert loaded is not None
    assert loaded.content_hash() == star.content_hash()
    assert library.load("star.safetensors", "0" * 64) is None
    assert library.load("../star.safetensors") is None


def test_linked_folders_are_followed(tmp_path: Path, star: ConceptDelta, other: ConceptDelta) -> None:
    """Under every name that ComfyUI's list has for them; a link back to where it is ends there."""
    models, nas = tmp_path / "models", tmp_path / "nas"
    star.save(nas / "deep" / "star.safetensors")
    other.save(models / "gogh.safetensors")
    for link, target in (("shared", nas), ("again", nas), ("deep", nas / "deep"), ("loop", models), ("broken", tmp_path / "none")):
        (models / link).symlink_to(target)
    (nas / "back").symlink_to(models)
    library = DeltaLibrary(lambda: [models])
    names = {e.name for e in library.entries()}
    assert {"shared/deep/star.safetensors", "again/deep/star.safetensors", "deep/star.safetensors", "gogh.safetensors"} <= names
    assert not any(name.startswith(("loop/", "broken/")) or "/back/" in name for name in names)
    assert library.load("shared/deep/star.safetensors") is not None
    assert [e.name for e in library.unique()] == ["again/deep/star.safetensors", "gogh.safetensors"]


def test_one_content_of_two_concepts_is_two_deltas(
    tmp_path: Path, star: ConceptDelta, make_random_delta: Callable[..., ConceptDelta]
) -> None:
    twin = make_random_delta("another", SHAPES, seed=1, kv_fingerprint="abcd")
    for delta, name in ((star, "a"), (star, "b"), (twin, "c")):
        delta.save(tmp_path / f"{name}.safetensors")
    library = DeltaLibrary(lambda: [tmp_path])
    assert len({e.content_hash for e in library.entries()}) == 1
    assert [e.name for e in library.unique()] == ["a.safetensors", "c.safetensors"]


def test_endings_in_capitals(tmp_path: Path, star: ConceptDelta) -> None:
    star.save(tmp_path / "STAR.SAFETENSORS")
    assert DeltaLibrary(lambda: [tmp_path]).load("STAR.SAFETENSORS") is not None


def test_a_namesake_in_a_second_folder_is_found_by_its_hash(tmp_path: Path, star: ConceptDelta, other: ConceptDelta) -> None:
    library = DeltaLibrary(lambda: [tmp_path / "a", tmp_path / "b"])
    star.save(tmp_path / "a" / "x.safetensors")
    other.save(tmp_path / "b" / "x.safetensors")
    loaded = library.load("x.safetensors", other.content_hash())
    assert loaded is not None
    assert loaded.content_hash() == other.content_hash()
    assert library.find("x.safetensors")[0] == tmp_path / "a" / "x.safetensors"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_file(tmp_path: Path, star: ConceptDelta) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    star.save(tmp_path / "x.safetensors")
    assert [e.name for e in DeltaLibrary(lambda: [tmp_path]).entries()] == ["x.safetensors"]


def test_resolve(tmp_path: Path, star: ConceptDelta, other: ConceptDelta, make_random_delta: Callable[..., ConceptDelta]) -> None:
    """Entries of a library, deltas and names are found by the same texts."""
    moon = make_random_delta("moon", SHAPES, seed=3)
    library = DeltaLibrary(lambda: [tmp_path])
    star.save(tmp_path / "sub" / "Mine.safetensors")
    other.save(tmp_path / "van-gogh.safetensors")
    moon.save(tmp_path / "star.safetensors")
    entries = library.entries()
    deltas = [ConceptDelta.load(e.path) for e in entries]
    where = [e.name for e in entries].index
    for items in (entries, deltas):
        assert resolve(" VAN  gogh", items) == [where("sub/Mine.safetensors"), where("van-gogh.safetensors")]
        assert resolve(f"van gogh [{star.content_hash()[:10]}]", items) == [where("sub/Mine.safetensors")]
        assert resolve("mine.safetensors", items) == resolve("sub\\mine", items) == [where("sub/Mine.safetensors")]
        assert resolve("van-gogh", items) == resolve(other.content_hash(), items) == [where("van-gogh.safetensors")]
        assert resolve("star", items) == [where("star.safetensors")]
        for unknown in ("", " ", "/", "gogh", "ine", "0" * 64, star.content_hash()[:5], "moon [0000000000]"):
            assert resolve(unknown, items) == []
    assert resolve("van-gogh.safetensors", ["moon", "van gogh"]) == [1]


@pytest.mark.parametrize("prefix", ["c:\\", "\0", "%date:yyyy%/", "what?", "con/", "a./", "sub /", "<a>-", 'say "hi"', "a|b", "con."])
def test_names_that_windows_cannot_hold(tmp_path: Path, star: ConceptDelta, prefix: str) -> None:
    with pytest.raises(SepMEError, match="on Windows"):
        DeltaLibrary(lambda: [tmp_path / "new"]).save(star, f"{prefix}/" if prefix == "con." else prefix)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_passed_over_when_there_is_a_sound_one(tmp_path: Path, star: ConceptDelta) -> None:
    """A damaged file still claims its hash."""
    library = DeltaLibrary(lambda: [tmp_path])
    data = bytearray(star.to_bytes())
    data[-3] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(SepMEError, match="get it again"):
        library.load("x.safetensors", star.content_hash())
    star.save(tmp_path / "b.safetensors")
    assert library.load("x.safetensors", star.content_hash()) is not None


def test_saving_replaces_nothing(tmp_path: Path, star: ConceptDelta, other: ConceptDelta) -> None:
    library = DeltaLibrary(lambda: [tmp_path / "new"])
    assert library.save(star) == library.save(star) == tmp_path / "new" / "van-gogh.safetensors"
    assert library.save(other) == tmp_path / "new" / "van-gogh-2.safetensors"
    assert library.save(other) == tmp_path / "new" / "van-gogh-2.safetensors"
    assert library.save(star, "sub/mine-") == tmp_path / "new" / "sub" / "mine-van-gogh.safetensors"
    assert len(list((tmp_path / "new").rglob("*"))) == 4


@pytest.mark.parametrize("prefix", ["../", "/tmp/", "a/../../", "..\\"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, star: ConceptDelta, prefix: str) -> None:
    library = DeltaLibrary(lambda: [tmp_path / "new"])
    with pytest.raises(SepMEError, match="leads out of"):
        library.save(star, prefix)
    assert list(tmp_path.iterdir()) == []


def test_no_link_leads_out_of_the_folder(tmp_path: Path, star: ConceptDelta) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SepMEError, match="leads out of"):
        DeltaLibrary(lambda: [tmp_path / "new"]).save(star, "link/")


def test_as_text(star: ConceptDelta, make_random_delta: Callable[..., ConceptDelta]) -> None:
    text = embed(star)
    assert unembed(text).to_bytes() == star.to_bytes()
    data = bytearray(base64.b64decode(text))
    data[-3] ^= 1
    for broken in (base64.b64encode(data).decode(), "no base64", "", "A" * (3 * MAX_EMBEDDED)):
        with pytest.raises(SepMEError, match=r"(?i)the delta inside the workflow"):
            unembed(broken)
    large = make_random_delta("large", dict.fromkeys(SHAPES, (1 << 14, 64)), rank=64)
    with pytest.raises(SepMEError, match="smaller max_rank"):
        embed(large)
