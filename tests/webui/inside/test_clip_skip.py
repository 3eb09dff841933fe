"""The host's clip skip: deltas say with which they were made, and pictures with another say so. Both hosts."""

from __future__ import annotations

from typing import Any

import modules.paths
import modules.shared
import modules.toy
import pytest
import torch


def train(webui: Any, folder: Any) -> Any:
    modules.paths.models_path = str(folder)
    host = webui.part("scripts.webui.host")
    book = webui.part("sepme.concepts").ConceptBook.loads("concepts: [star, heart]")
    options = webui.part("sepme.train").TrainOptions.for_mode(objective="closed-form")
    with host.loaded_model() as model:
        delta = webui.part("sepme.train").make_delta(webui.planner(model, book), "star", model, options)
    host.library.save(delta)
    return delta


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_what_was_in_effect_is_recorded(webui: Any, tmp_path: Any, skipped: int) -> None:
    modules.shared.opts.CLIP_stop_at_last_layers = 1 + skipped
    delta = train(webui, tmp_path)
    assert delta.info["clip_skip"] == skipped
    erased = webui.erase("star")
    assert not torch.equal(erased, webui.draw(script=False))
    assert not webui.last.comments
    modules.shared.opts.CLIP_stop_at_last_layers = 1
    webui.erase("star")
    said = [c for c in webui.last.comments if "layers skipped" in c]
    assert bool(said) == bool(skipped)
    override = {"CLIP_stop_at_last_layers": 1 + skipped}  # as the API and pasted infotexts set it, for one picture
    assert torch.equal(webui.erase("star", override_settings=override), erased)
    assert not webui.last.comments
    assert webui.draw("a house", True, ["star"]) is not None
    webui.draw("a star <erase:star>")
    assert bool([c for c in webui.last.comments if "layers skipped" in c]) == bool(skipped)


def test_sdxl_has_its_own_layers(webui: Any, tmp_path: Any) -> None:
    """Automatic1111 skips none more for SDXL unless it is told to; Forge skips at least two there."""
    modules.shared.sd_model = modules.toy.Checkpoint(pooled=24)
    modules.shared.opts.CLIP_stop_at_last_layers = 2
    assert train(webui, tmp_path).info["clip_skip"] == 0
    webui.erase("star", override_settings={"CLIP_stop_at_last_layers": 1})
    assert not webui.last.comments
