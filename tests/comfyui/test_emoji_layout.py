"""A model laid out as the emoji world's (no attention on the finest level, half-width autoencoder) is hosted exactly."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui.inside import PACK, Inside

from sepme.demo.emoji.diffusion import build_unet
from sepme.demo.emoji.export import save_half
from sepme.demo.emoji.text import build_text_encoder, build_tokenizer
from sepme.demo.emoji.vae import begin_with_averages, build_vae

pytestmark = pytest.mark.xdist_group("comfyui inside")


@pytest.fixture(scope="module")
def both(inside: Inside, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same random weights in diffusers and in ComfyUI."""
    folder: Path = tmp_path_factory.mktemp("emoji")
    tokenizer = build_tokenizer(folder / "tokenizer", ["cat", "by", "noto", "a"])
    torch.manual_seed(0)
    unet, text, vae = build_unet().eval(), build_text_encoder(tokenizer).eval(), build_vae().eval()
    begin_with_averages(vae)
    for part, module in (("unet", unet), ("text_encoder", text), ("vae", vae)):
        save_half(module, folder / part)
        module.float()
    host = importlib.import_module(f"{PACK}.nodes.host.demo")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(host, "FOLDER", folder)
        model, clip, latent = host.demo_model()
    return SimpleNamespace(tokenizer=tokenizer, unet=unet, text=text, vae=vae, model=model, clip=clip, latent=latent)


@torch.inference_mode()
def test_noise_is_the_same(both: Any) -> None:
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), torch.randn(2, 77, 384)
    ours = both.unet(x, t, context).sample
    hosted = both.model.model.diffusion_model(x, t, context=context)
    assert torch.allclose(hosted, ours, atol=1e-5)


@torch.inference_mode()
def test_text_is_the_same(both: Any) -> None:
    ids = both.tokenizer("a cat by noto", padding="max_length", return_tensors="pt").input_ids
    hosted = both.clip.encode_from_tokens(both.clip.tokenize("a cat by noto"))
    assert torch.allclose(hosted, both.text(ids).last_hidden_state, atol=1e-5)


@torch.inference_mode()
def test_pictures_are_the_same(both: Any) -> None:
    z = torch.randn(1, 4, 16, 16)
    ours = (both.vae.decoder(z) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    hosted = both.latent.decode(z)
    assert hosted.shape == (1, 128, 128, 3)
    assert torch.allclose(hosted, ours, atol=1e-5)
    assert torch.allclose(both.latent.encode(hosted), both.vae.encoder(ours.movedim(-1, 1) * 2 - 1), atol=1e-4)
