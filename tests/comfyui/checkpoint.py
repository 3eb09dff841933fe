"""A seeded checkpoint in the layout of SD1.5: its text encoder at full size, its UNet narrow where detection allows, a tiny VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from ldm_files import DEPTHS, unet_name
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import sepme

TAESD = Path(sepme.__file__).parent / "demo" / "model" / "vae" / "diffusion_pytorch_model.safetensors"


def save_sd15(path: Path) -> Path:
    """Write the checkpoint, float16; ComfyUI takes it for SD1.5 by ``model_channels`` 320 and ``context_dim`` 768."""
    with torch.random.fork_rng():
        torch.manual_seed(15)
        tensors = _unet() | _text_encoder() | _vae()
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, path)
    return path


def _unet() -> dict[str, Tensor]:
    depths = DEPTHS["sd1"]
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(320,) * 4, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
    )  # fmt: skip
    bare = {i for i, depth in enumerate(reversed(depths)) if depth == 0}
    return {f"model.diffusion_model.{unet_name(k, bare)}": v for k, v in unet.state_dict().items()}


def _text_encoder() -> dict[str, Tensor]:
    config: Any = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"
    )
    encoder = CLIPTextModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)  # far apart tokens, as training makes them
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items() if not k.endswith("position_ids")}
    return {f"cond_stage_model.transformer.text_model.{k}": v for k, v in state.items()}


def _vae() -> dict[str, Tensor]:
    names = {}
    for key, value in load_file(TAESD).items():
        side, _, index, rest = key.split(".", 3)
        names[f"first_stage_model.taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value
    return names
