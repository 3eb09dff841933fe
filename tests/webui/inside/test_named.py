"""Concepts that are typed into the panel and are no files: erased, weighed, recorded, pasted, and worked out once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import modules.paths
import pytest
import torch

from .conftest import WebUI
from .page import build


@pytest.fixture
def fresh(webui: WebUI, tmp_path: Path) -> WebUI:
    """The host with no files at all."""
    modules.paths.models_path = str(tmp_path)
    return webui


def named(ui: WebUI, names: str, prompt: Any = "a star", strengths: str = "", enabled: bool = True, concepts: Any = ()) -> torch.Tensor:
    return ui.draw(prompt, enabled, list(concepts), strengths, True, "auto", names)


def test_a_name_is_enough(fresh: WebUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = fresh.draw(script=False)
    assert not torch.equal(named(fresh, "star, heart"), stock)
    assert len(list((tmp_path / "sepme" / ".cache").glob("*.json"))) == 1
    made = fresh.part("sepme.train.erasures")
    monkeypatch.setattr(made, "_made", None)  # whatever is worked out anew now, fails
    assert torch.equal(named(fresh, "star, heart", strengths='{"star": 0}'), stock)
    assert not torch.equal(named(fresh, "heart, star", strengths='{"star": 0.5}'), stock)
    assert "SepME note" not in fresh.infotexts[0]
    assert 'SepME erase: "heart' in fresh.infotexts[0] or "SepME erase: heart" in fresh.infotexts[0]
    assert torch.equal(named(fresh, "star, heart", prompt="a star <keep:star>"), stock)
    assert torch.equal(named(fresh, "star, heart", enabled=False), stock)


def test_beside_files(webui: WebUI) -> None:
    stock = webui.draw("a star", script=False)
    assert not torch.equal(named(webui, "sun", concepts=["star"]), stock)
    assert torch.equal(named(webui, "star", concepts=["star"]), stock)
    assert "typed and chosen as a file" in webui.infotexts[0]
    assert torch.equal(named(webui, "a<b"), stock)
    assert "nothing is erased" in webui.infotexts[0]


def test_the_panel_shows_and_pastes_names(fresh: WebUI) -> None:
    build(fresh)
    panel = object.__new__(fresh.part("scripts.webui.panel").Panel)
    panel.library = fresh.part("scripts.webui.host").library
    rows = panel._rows([], "", "star, heart")
    assert rows.count("by its name") == 4  # text and title of two rows
    record = fresh.part("scripts.webui.infotext")
    params = {"Steps": "3", "SepME erase": record.write([record.Record("star", "0" * 64, 0.5), record.Record("heart", "1" * 64, 1.0)])}
    assert panel._read_named(params) == "star, heart"
    assert json.loads(panel._read_strengths(params)) == {"star": 0.5, "heart": 1.0}
    assert panel._read_named({"Steps": "3"}) == ""
    assert panel._read_named({}) is None
