"""Infotext: written, read back, pasted; labels of files."""

from __future__ import annotations

from typing import Any

import modules.infotext_utils
import pytest


@pytest.fixture
def webui(make_webui: Any, delta_files: Any) -> Any:
    return make_webui("a1111", delta_files)


@pytest.mark.parametrize("name", ["van gogh", 'a "b", c', "star (shape)", "x, y (0123456789)", "ünï", "a\\b"])
@pytest.mark.parametrize("strength", [1.0, 0.0, -0.35, 1e-05, 12.5])
def test_records_survive_the_hosts_quoting(webui: Any, name: str, strength: float) -> None:
    infotext = webui.part("scripts.webui.infotext")
    records = [infotext.Record(name, "0123456789", strength), infotext.Record("other", "abcdef0123", 0.5)]
    line = f"{infotext.CONCEPTS}: {modules.infotext_utils.quote(infotext.write(records))}, Version: 1"
    params = modules.infotext_utils.parse_generation_parameters(f"a prompt\nSteps: 3, {line}")
    assert infotext.read(params) == records
    assert params["Version"] == "1"


def test_a_picture_says_what_was_on(webui: Any) -> None:
    webui.draw("a star <erase:moon:0.25>", True, ["star", "heart"], '{"heart": 0.5}', False, "auto")
    infotext = webui.part("scripts.webui.infotext")
    params = modules.infotext_utils.parse_generation_parameters(webui.infotexts[0])
    hashes = {e.concept: e.content_hash[:10] for e in webui.part("scripts.webui.host").library.entries()}
    assert infotext.read(params) == [infotext.Record("star", hashes["star"], 1.0), infotext.Record("heart", hashes["heart"], 0.5)]
    assert infotext.read(params, infotext.TAGS) == [infotext.Record("moon", hashes["moon"], 0.25)]
    assert params[infotext.GATE] == "off"
    assert "<erase:moon:0.25>" in params["Prompt"]


def test_files_of_one_name_are_told_apart(make_webui: Any, delta_files: Any, tmp_path: Any) -> None:
    ui = make_webui("a1111", tmp_path)
    library, files = ui.part("scripts.webui.host").library, ui.part("scripts.webui.files")
    ConceptDelta = ui.part("sepme.delta.concept_delta").ConceptDelta
    first = ConceptDelta.load(next((delta_files / "sepme").glob("star*.safetensors")))
    library.save(first)
    library.save(first, "again/")
    assert list(files.labels(library.entries())) == ["star"]
    library.save(ConceptDelta(first.concept, first.down, {k: -v for k, v in first.up.items()}, first.scale, first.gate, first.info))
    labels = files.labels(library.entries())
    assert len(labels) == 2
    assert all(label == f"star [{entry.content_hash[:10]}]" for label, entry in labels.items())
    sampled = [ui.erase(label) for label in labels]
    assert not sampled[0].equal(sampled[1])
    ui.erase(*labels)
    assert any("erase the same concept" in c for c in ui.last.comments)
    with pytest.raises(ValueError, match="means several files"):
        files.choose("star", library.entries(), "other")
    assert files.choose("STAR-2.safetensors", library.entries(), "") is not None
    assert files.choose("nobody", library.entries(), "") is None


def test_plot_axes(webui: Any) -> None:
    strength, concepts = webui.grid.axis_options
    assert [strength.label, concepts.label] == ["SepME strength", "SepME concepts"]
    assert concepts.choices() == ["none", "heart", "moon", "star"]
    stock, erased, half = webui.draw(script=False), webui.erase("star"), webui.erase("star", strengths='{"star": 0.5}')

    def sampled(axis: Any, value: Any, *args: Any) -> Any:
        given: dict[str, Any] = {}
        holder = type("P", (), {"__setattr__": lambda self, k, v: given.__setitem__(k, v)})()
        axis.apply(holder, value, [value])
        return webui.draw("a star", *args, **given)

    panel = (True, ["star"], "", True, "auto")
    assert sampled(strength, 0.5, *panel).equal(half)
    assert sampled(strength, 0.0, *panel).equal(stock)
    assert sampled(concepts, "star + heart").equal(webui.erase("star", "heart"))
    assert sampled(concepts, "none", *panel).equal(stock)
    assert sampled(concepts, "star").equal(erased)
    assert webui.last.extra_generation_params["SepME concepts"].startswith("star (")


def test_cells_of_a_plot_share_what_the_infotext_is_made_of(webui: Any) -> None:
    shared = {"Other": "stays"}  # an empty one would be replaced
    webui.draw("a star <erase:moon>", True, ["star"], '{"star": 2}', False, "auto", extra_generation_params=shared)
    assert {k for k in shared if k.startswith("SepME")} == {"SepME concepts", "SepME gate", "SepME tags", "SepME note"}
    webui.draw("a star", extra_generation_params=shared)
    assert not [k for k in shared if k.startswith("SepME")]


def test_only_text_files_of_the_delta_folder_are_read(webui: Any) -> None:
    book = webui.part("scripts.webui.book")
    with pytest.raises(ValueError, match="leads out of"):
        book.parse("concepts: [star]\npreserve_file: /etc/passwd")
    with pytest.raises(ValueError, match="leads out of"):
        book.parse("concepts: [star]\npreserve_file: ../../config.json")
    assert book.parse("concepts: [star]\npreserve_file: keep.txt").preserve_file == str(webui.folder / "keep.txt")


def test_our_packages_are_not_found_by_others(webui: Any) -> None:
    import importlib
    import sys

    from webui.conftest import ROOT

    assert str(ROOT) not in sys.path
    importlib.invalidate_caches()
    for name in ("kernels", "nodes"):
        spec = importlib.util.find_spec(name)
        assert spec is None or str(ROOT) not in str(spec.origin)
