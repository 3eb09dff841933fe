"""SepME Train when the memory runs out: what can be smaller is said, whatever raises the error."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui.inside import PACK, Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")


WAYS = (
    r"ran out\. Training by gcirs on 2 pictures of 128 x 128 pixels takes about \d+ MB of memory: \d+ MB for the model, \d+ MB for a step"
    r"\. \S+ GB are free; choose batch 1 \(about \d+ MB\) or size 64 \(about \d+ MB\) or batch 1 and size 64 .* or the objective closed"
)


ERRORS = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_what_can_be_smaller(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever error it is; for the second one nothing is counted again."""
    train = importlib.import_module(f"{PACK}.nodes.train")
    counted, count = dict[tuple[int, int], Any](), train.needed

    def needed(denoiser: Any, model: int, empty: Any, options: Any) -> Any:
        key = options.batch, denoiser.latent_shape[-1]
        counted[key] = counted.get(key) or count(denoiser, model, empty, options)
        return counted[key]

    monkeypatch.setattr(train, "needed", needed)
    monkeypatch.setattr(train.SepMETrain, "hidden", SimpleNamespace(prompt=None, unique_id="me"))
    book = inside.sepme.ConceptBook((inside.sepme.Concept("star"),))
    for error in ERRORS:

        def fail(*arguments: Any, error: Exception = error) -> None:
            assert arguments[0].options.batch == 2
            raise error

        monkeypatch.setattr(train, "train_book", fail)
        with pytest.raises(ValueError, match=WAYS):
            train.SepMETrain.execute(inside.model, inside.clip, book, batch=2, nearby=0)
    assert len(counted) == 4


def test_sentences(inside: Inside) -> None:
    train = importlib.import_module(f"{PACK}.nodes.train")
    options = inside.sepme.TrainOptions
    ways = {"batch 1": 3 * 10**9, "size 256": 9 * 10**9}
    assert "It takes 9. 5.0 GB are free; choose batch 1 (about 3.0 GB) or the obj" in train.too_large(
        ["It takes 9."], options(), ways, 5 * 10**9
    )
    assert "are free; choose the objective closed-form" in train.too_large([], options(), ways, 10**9)
    assert "edit context" in train.too_large([], options(objective="closed-form"), {}, 0)
