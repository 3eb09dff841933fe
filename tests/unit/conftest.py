"""A tiny pipeline whose autoencoder has a posterior (8 tokens of 64 channels); the double encoder, and a plan on it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from planning import NAMES, OPTIONS, ORDINARY, book_of
from transformers import CLIPTextConfig, CLIPTextModel

from sepme.demo.train import build_tokenizer
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.planner import Planner, Subspace


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=64, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    with torch.no_grad():  # random weights hardly heed the prompt; these do
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                module.weight.mul_(6)
    return unet


@pytest.fixture(scope="session")
def tiny_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], DiffusersHost]:
    """``tiny_host(dtype)``: a fresh host with always the same weights."""
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.model_max_length = 8

    def make(dtype: torch.dtype = torch.float32) -> DiffusersHost:
        torch.manual_seed(0)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False
        )
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=text, tokenizer=tokenizer, unet=_unet(), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        return DiffusersHost(pipe.to(dtype))

    return make


@pytest.fixture(scope="module")
def encoder(world: SimpleNamespace) -> Any:
    return world.Encoder()


@pytest.fixture(scope="module")
def planned(encoder: Any) -> dict[str, Subspace]:
    """Three concepts and a preserved prompt, tolerance mode."""
    planner = Planner(encoder, book_of(3, ["our logo"]), OPTIONS, ORDINARY)
    return {n: planner.plan(n) for n in NAMES[:3]}
