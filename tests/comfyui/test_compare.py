"""SepME Compare: stock and erased of one seed are what KSampler draws; the grid draws every concept at every strength."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui.inside import PACK, Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")

LATENT = {"samples": torch.zeros(2, 4, 8, 8)}
SAMPLING = {"seed": 5, "steps": 3, "cfg": 3.0}


@pytest.fixture
def compare(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``compare(model, prompt, grid=False, ...)``: the three images."""
    node = importlib.import_module(f"{PACK}.nodes.compare").SepMECompare

    def run(model: Any, prompt: Any, grid: bool = False, **more: Any) -> Any:
        prompts = {"me": {"class_type": "SepMECompare", "inputs": {}}, "it": {"class_type": "X", "inputs": {"images": ["me", 2 * grid]}}}
        monkeypatch.setattr(node, "hidden", SimpleNamespace(prompt=prompts, unique_id="me"))
        with torch.inference_mode():
            return node.execute(model, prompt, inside.text(""), LATENT, inside.vae, **SAMPLING, **more).result

    return run


def test_what_ksampler_draws(inside: Inside, compare: Any) -> None:
    """The first picture is the stock model's, whatever is switched on; the second what MODEL and prompt say."""
    model, prompt = inside.apply(inside.model), inside.toggled("an openmoji star", {"openmoji": 0.0})
    before, after, both = compare(model, prompt)
    stock, erased = (inside.sample(m, p, batch=2) for m, p in ((inside.model, inside.text("an openmoji star")), (model, prompt)))
    with torch.inference_mode():
        assert torch.equal(before, inside.vae.decode(stock))
        assert torch.equal(after, inside.vae.decode(erased))
    assert not torch.equal(before, after)
    assert torch.equal(both, torch.cat([before, after], dim=2))


def test_grid(inside: Inside, compare: Any) -> None:
    """Rows differ where the concept is in the prompt; with CLIP every row draws its own concept."""
    model = inside.apply(inside.model)
    _, _, grid = compare(model, inside.text("a star"), grid=True, strengths="0, 1")
    width, height = grid.shape[2], grid.shape[1]
    columns = [grid[0, :, width - 16 - 2 * 132 + 132 * j : width - 16 - 2 * 132 + 132 * j + 128] for j in range(2)]
    star, openmoji = ([c[52 + 132 * i : 52 + 132 * i + 128] for c in columns] for i in range(2))
    assert height == 52 + 2 * 132 + 16
    assert not torch.equal(*star)
    assert torch.equal(*openmoji)
    assert torch.equal(star[0], openmoji[0])
    _, _, own = compare(model, inside.text("a star"), grid=True, strengths="0,1", clip=inside.clip)
    assert not torch.equal(own, grid)


@pytest.mark.parametrize("text", ["", "a", "1; 2", "nan", "1e9", ",".join("1" * 11)])
def test_no_strengths(inside: Inside, compare: Any, text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        compare(inside.apply(inside.model), inside.text("a star"), grid=True, strengths=text)


def test_nothing_to_compare(inside: Inside, compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Nothing is erased"):
        compare(inside.model, inside.text("a star"))
    monkeypatch.setattr(importlib.import_module(f"{PACK}.nodes.compare"), "MAX_PICTURES", 3)
    with pytest.raises(ValueError, match="too many pictures"):
        compare(inside.apply(inside.model), inside.text("a star"), grid=True, strengths="0,1")
