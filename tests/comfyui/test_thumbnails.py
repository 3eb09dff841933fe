"""Small pictures in delta files: stock beside erased, the same every time, for show alone."""

from __future__ import annotations

import importlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui.inside import PACK, Inside
from PIL import Image

pytestmark = pytest.mark.xdist_group("comfyui inside")


@pytest.fixture
def thumbnails(inside: Inside) -> Any:
    return importlib.import_module(f"{PACK}.nodes.thumbnails")


def halves(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures of a data URL."""
    picture = importlib.import_module(f"{PACK}.sepme.delta.thumbnail").picture(text)
    image = np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB")).astype(int)
    assert image.shape == (128, 256, 3)
    assert (picture.kind, len(text) < 16 << 10) == ("image/jpeg", True)
    return image[:, :128], image[:, 128:]


def test_stock_beside_erased(inside: Inside, thumbnails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta, nothing = inside.deltas[0], replace(inside.deltas[1], up={n: 0 * u for n, u in inside.deltas[1].up.items()})
    made, same = thumbnails.with_thumbnails(inside.model, inside.clip, (delta, nothing))
    stock, erased = halves(made.thumbnail)
    assert abs(stock - erased).mean() > 3
    assert abs(np.subtract(*halves(same.thumbnail))).mean() < 1  # JPEG's own
    assert made.content_hash() == delta.content_hash()
    loaded = type(delta).load(made.save(tmp_path / "star.safetensors"))
    assert loaded.thumbnail == made.thumbnail
    monkeypatch.setattr(thumbnails, "_drawn", type(thumbnails._drawn)())
    assert thumbnails.with_thumbnails(inside.model, inside.clip, (delta,))[0].thumbnail == made.thumbnail
    monkeypatch.setattr(thumbnails, "_drawn", type(thumbnails._drawn)())
    monkeypatch.setattr(thumbnails, "bearable", lambda device, parameters: False)
    assert thumbnails.with_thumbnails(inside.model, inside.clip, (delta,)) == (delta,)
    assert thumbnails.with_thumbnails(inside.model, inside.clip, (delta,))[0].thumbnail == ""


def test_colours_by_latent_channel(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Stable Diffusion's latents, where no preview is set and no VAE is at hand."""
    import comfy.latent_formats
    import torch

    denoiser = inside.host.UNetDenoiser(inside.model)
    monkeypatch.setattr(inside.model.model, "latent_format", comfy.latent_formats.SD15())
    grey = np.asarray(denoiser.picture(torch.zeros(1, 4, 8, 8)))
    assert grey.shape == (8, 8, 3)
    assert abs(grey.astype(int) - 128).max() < 40
    assert np.asarray(denoiser.picture(torch.randn(1, 4, 8, 8))).std() > 0
