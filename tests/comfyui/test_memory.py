"""SepME Train when the memory runs out: what can be smaller is said, whatever raises the error."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui.inside import PACK, Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_can_be_smaller(inside: Inside, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    train = importlib.import_module(f"{PACK}.nodes.train")

    def fail(*arguments: Any) -> None:
        assert arguments[0].options.batch == 2
        raise error

    monkeypatch.setattr(train, "train_book", fail)
    monkeypatch.setattr(train.SepMETrain, "hidden", SimpleNamespace(prompt=None, unique_id="me"))
    book = inside.sepme.ConceptBook((inside.sepme.Concept("star"),))
    with pytest.raises(ValueError, match=r"2 pictures of 64 x 64 pixels; choose batch 1 .*, or the objective closed-form"):
        train.SepMETrain.execute(inside.model, inside.clip, book, batch=2)


def test_sentences(inside: Inside) -> None:
    train = importlib.import_module(f"{PACK}.nodes.train")
    options = inside.sepme.TrainOptions
    assert "batch 1 (a step of 4 pictures needs 4 times as much), size 256" in train.too_large((4, 64, 64), options())
    assert "batch 1 (" not in train.too_large((4, 64, 64), options(batch=1))
    assert "edit context" in train.too_large((4, 64, 64), options(objective="closed-form"))
