"""diffusers' own pipelines around the tiny models, without text encoders, by the family's file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler as Flow
from torch import nn

from . import diffusers_models

BLOCKS: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
VIDEO: dict[str, Any] = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


def _still() -> Any:
    return diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(4,) * 4, norm_num_groups=1, layers_per_block=1, **BLOCKS)


SHIFTED = Flow(shift=3.0)
PIPELINES: dict[str, tuple[str, Any, Callable[[], Any]]] = {  # class, scheduler, autoencoder
    "flux1": ("FluxPipeline", Flow(shift=3.0, use_dynamic_shifting=True), _still),
    "chroma": ("ChromaPipeline", Flow(), _still),
    "qwen_image": (
        "QwenImagePipeline",
        Flow(use_dynamic_shifting=True),
        lambda: diffusers.AutoencoderKLQwenImage(**VIDEO),
    ),
    "z_image": ("ZImagePipeline", SHIFTED, _still),
    "lumina2": ("Lumina2Pipeline", SHIFTED, _still),
    "auraflow": ("AuraFlowPipeline", SHIFTED, _still),
    "wan": ("WanPipeline", SHIFTED, lambda: diffusers.AutoencoderKLWan(**VIDEO)),
    "pixart": ("PixArtSigmaPipeline", diffusers.DPMSolverMultistepScheduler(), _still),
}


def build(family: str, transformer: nn.Module | None = None) -> Any:
    """The family's pipeline, around the tiny model of :mod:`~.diffusers_models` if no other is given."""
    kind, scheduler, autoencoder = PIPELINES[family]
    own = getattr(diffusers, kind)
    parts = {"transformer": transformer or diffusers_models.build(family).model, "scheduler": scheduler, "vae": autoencoder().eval()}
    texts = dict.fromkeys(
        name for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2") if name in own.__init__.__code__.co_varnames
    )
    pipe = own(**parts, **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
