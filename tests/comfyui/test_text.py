"""ComfyUI's CLIP as the text encoder of training and verification."""

from __future__ import annotations

import gc
from importlib import import_module

import pytest
import torch
from comfyui.inside import Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")


def test_ordinary_prompts_are_read_once(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as the text encoder, its LoRAs and its clip skip stay the same; other prompts are read every time."""
    ordinary = import_module(f"{inside.sepme.__name__}.plan.gate").ordinary_prompts()[:40]
    clip = inside.host.demo_model()[1]
    calls: list[int] = []
    clip.cond_stage_model.clip_l.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))

    def read(clip: object, *prompts: str) -> tuple[torch.Tensor, int]:
        before = sum(calls)
        return inside.host.ClipEncoder(clip).encode(prompts).context, sum(calls) - before

    first, rows = read(clip, *ordinary)
    assert rows == 40
    again, rows = read(clip.clone(), *ordinary)
    assert rows == 0
    assert torch.equal(again, first)
    changed = clip.clone()
    changed.patcher.add_patches({k: (torch.ones_like(v),) for k, v in clip.cond_stage_model.state_dict().items() if "fc1.weight" in k}, 0.1)
    skipping = clip.clone()
    skipping.clip_layer(-2)
    for other in (changed, skipping, clip):
        found, rows = read(other, *ordinary)
        assert rows == 40
        assert torch.equal(found, first) is (other is clip)
    for _ in range(2):
        assert read(clip, "a star of my own")[1] == 1


def test_verification_reads_what_training_has_read(inside: Inside) -> None:
    """And the other way round: the ordinary prompts that gates are not calibrated on."""
    sepme, clip = inside.sepme, inside.host.demo_model()[1]
    verify = import_module(f"{sepme.__name__}.delta.verify").verify
    rows: list[int] = []
    clip.cond_stage_model.clip_l.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    sepme.Planner(inside.host.ClipEncoder(clip), sepme.ConceptBook((sepme.Concept("star", ("star",)),))).plan("star")
    assert sum(rows) > 500
    rows.clear()
    assert verify(inside.host.ClipEncoder(clip), inside.deltas).checks[0].false_touch_rate < 1
    assert 0 < sum(rows) < 100


def test_a_freed_text_encoder_takes_its_prompts_along(inside: Inside) -> None:
    text = import_module(f"{inside.host.__name__}.text")
    ordinary = import_module(f"{inside.sepme.__name__}.plan.gate").ordinary_prompts()
    clip = inside.host.demo_model()[1]
    before = len(text._ORDINARY)
    inside.host.ClipEncoder(clip).encode(ordinary[:2])
    assert len(text._ORDINARY) == before + 1
    del clip
    import comfy.model_management

    comfy.model_management.cleanup_models_gc()
    comfy.model_management.unload_all_models()
    gc.collect()
    assert len(text._ORDINARY) == before
