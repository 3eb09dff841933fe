"""Seeded checkpoints in the layouts of SD1.5, SD2 (v) and SDXL.

Text encoders have their full width, UNets are narrow where detection allows, the VAE is a tiny one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from ldm_files import DEPTHS, open_clip, unet_name
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sepme

TAESD = Path(sepme.__file__).parent / "demo" / "model" / "vae" / "diffusion_pytorch_model.safetensors"
TAESD_WIDTH = 32
CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
LAYERS = {768: 12, 1024: 24, 1280: 32}  # of CLIP-L, OpenCLIP-H, OpenCLIP-G, by width
POOLED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1280 + 6 * 256}


def save_checkpoint(kind: str, path: Path, layers: int | None = None) -> Path:
    """Write a checkpoint, float16, that ComfyUI takes for ``sd1``, ``sd2`` or ``sdxl``.

    Args:
        layers: of each text encoder; all that it has by default. A host must be told of fewer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(15)
        tensors = _unet(kind) | _vae()
        if kind == "sd1":
            tensors |= _transformers(_encoder(768, layers, "quick_gelu"), "cond_stage_model.transformer.")
        if kind == "sd2":
            tensors |= open_clip(_encoder(1024, layers, "gelu"), "cond_stage_model.model.")
        if kind == "sdxl":
            tensors |= _transformers(_encoder(768, layers, "quick_gelu"), "conditioner.embedders.0.transformer.")
            tensors |= open_clip(_encoder(1280, layers, "gelu", CLIPTextModelWithProjection), "conditioner.embedders.1.model.")
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, path)
    return path


def _unet(kind: str) -> dict[str, Tensor]:
    depths = DEPTHS[kind]
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(320,) * len(depths), cross_attention_dim=CONTEXT[kind],
        attention_head_dim=8 if kind == "sd1" else 5,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        transformer_layers_per_block=[d or 1 for d in depths], use_linear_projection=kind != "sd1", **(POOLED if kind == "sdxl" else {}),
    )  # fmt: skip
    for name, weight in unet.named_parameters():  # text counts, as after training
        if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
            weight.data *= 6
    bare = {i for i, depth in enumerate(reversed(depths)) if depth == 0}
    tensors = {f"model.diffusion_model.{unet_name(k, bare)}": v for k, v in unet.state_dict().items()}
    if kind == "sd2":  # by which ComfyUI knows that v is predicted
        torch.nn.init.normal_(tensors["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"], std=0.2)
    return tensors


def _encoder(width: int, layers: int | None, act: str, kind: Any = CLIPTextModel) -> Any:
    config: Any = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers or LAYERS[width],
        num_attention_heads=width // 64, hidden_act=act, projection_dim=width,
    )  # fmt: skip
    encoder = kind(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)  # far apart tokens, as training makes them
    return encoder


def _transformers(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items() if not k.endswith("position_ids")}
    return {f"{prefix}text_model.{k}": v for k, v in state.items()}


def _vae() -> dict[str, Tensor]:
    names = {}
    for key, value in load_file(TAESD).items():
        side, _, index, rest = key.split(".", 3)
        width = [(0, 64 - size if size == TAESD_WIDTH else 0) for size in value.shape]  # ComfyUI's is fixed; what is added is zero
        wide = torch.nn.functional.pad(value, [n for ends in reversed(width) for n in ends])
        names[f"first_stage_model.taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = wide
    return names
