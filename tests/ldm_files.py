"""Seeded random Stable Diffusion models, narrow but in the true layouts, as diffusers folders and as single files in LDM names.

The names are written out here from the published checkpoints' layout, independently of the conversion under test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sepme.hosts import ldm
from sepme.hosts.tokenizers import TOKENS, vocabulary_of

KINDS = ("sd1", "sd2", "sdxl")
END = 513
CHANNELS = {"sd1": (32, 32, 64, 64), "sd2": (64, 64, 64, 64), "sdxl": (64, 64, 64)}
DEPTHS = {"sd1": [1, 1, 1, 0], "sd2": [1, 1, 1, 0], "sdxl": [0, 2, 10]}
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of bytes and no merges: 514 tokens."""
    vocabulary, merges = vocabulary_of([])
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=TOKENS)


def _encoder(width: int, layers: int, act: str, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=END + 1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        hidden_act=act, projection_dim=width, bos_token_id=END - 1, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    for name, weight in encoder.named_parameters():  # far apart tokens, as training makes them
        if "token_embedding" in name:
            torch.nn.init.normal_(weight, std=1.0)
    return encoder


def pipeline(kind: str, prediction: str = "epsilon") -> Any:
    """A small random pipeline of this kind, float32, 64 pixels."""
    torch.manual_seed(KINDS.index(kind))
    xl, depths = kind == "sdxl", DEPTHS[kind]
    encoders = [_encoder(128, 2, "gelu" if kind == "sd2" else "quick_gelu")] + ([_encoder(64, 3, "gelu", True)] if xl else [])
    context = 192 if xl else 128
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 64 + 6 * 16}
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=CHANNELS[kind], cross_attention_dim=context,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        transformer_layers_per_block=[d or 1 for d in depths], use_linear_projection=kind != "sd1",
        attention_head_dim=8 if kind == "sd1" else [c // 64 for c in CHANNELS[kind]], **(added if xl else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, latent_channels=4, scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl,
    )  # fmt: skip
    scheduler = DDIMScheduler(**ldm.SCHEDULE, prediction_type=prediction)
    common = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": encoders[0]}
    if xl:
        pads = {"tokenizer": tokenizer("<|endoftext|>"), "tokenizer_2": tokenizer("!")}
        return StableDiffusionXLPipeline(**common, **pads, text_encoder_2=encoders[1], add_watermarker=False)
    pad = "!" if kind == "sd2" else "<|endoftext|>"
    return StableDiffusionPipeline(
        **common, tokenizer=tokenizer(pad), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def save_single_file(pipe: Any, kind: str, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a pipeline as one file in LDM names."""
    bare = {i for i, depth in enumerate(reversed(DEPTHS[kind])) if depth == 0}
    tensors = {f"model.diffusion_model.{unet_name(k, bare)}": v for k, v in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        attention = value.ndim == 2 and ".attentions." in name
        tensors[f"first_stage_model.{_vae_name(name)}"] = value[:, :, None, None] if attention else value
    if kind == "sd2":
        tensors |= open_clip(pipe.text_encoder, "cond_stage_model.model.", spare_layer=True)
    else:
        prefix = "cond_stage_model.transformer." if kind == "sd1" else "conditioner.embedders.0.transformer."
        state = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
        tensors |= {f"{prefix}text_model.{k}": v for k, v in state.items()}
        tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    if kind == "sdxl":
        tensors |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    tensors["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata)
    return path


def unet_name(name: str, bare: set[int]) -> str:
    """LDM name of a UNet's tensor; ``bare``: up blocks without attention."""
    fixed = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    stem, end = name.rsplit(".", 1)
    if stem in fixed:
        return f"{fixed[stem]}.{end}"
    stem = re.sub(r"(resnets\.\d+)\.(\w+)$", lambda m: f"{m[1]}.{RESNET[m[2]]}", stem)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", stem):
        return f"middle_block.{2 * int(match[2]) if match[1] == 'resnets' else 1}.{match[3]}.{end}"
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", stem):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op.{end}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", stem)
    assert match, name
    side, block, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        return f"input_blocks.{3 * block + 1 + index}.{0 if part == 'resnets' else 1}.{rest}.{end}"
    if part == "upsamplers":  # behind the attention, or in its place where the block has none
        return f"output_blocks.{3 * block + 2}.{1 if block in bare else 2}.{rest}.{end}"
    return f"output_blocks.{3 * block + index}.{0 if part == 'resnets' else 1}.{rest}.{end}"


def _vae_name(name: str) -> str:
    names = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1"}
    names |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names |= {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "samplers.0": "sample", "resnets": "block"}
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name)
    return re.sub(r"down_blocks\.(\d)", r"down.\1", name)


def open_clip(encoder: Any, prefix: str, spare_layer: bool = False) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
    }
    width = encoder.config.hidden_size
    out["text_projection"] = state["text_projection.weight"].T if "text_projection.weight" in state else torch.randn(width, width)
    layers = encoder.config.num_hidden_layers
    for i in range(layers):
        layer, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for end in ("weight", "bias"):
            out[f"{block}.attn.in_proj_{end}"] = torch.cat([state[f"{layer}.self_attn.{p}_proj.{end}"] for p in "qkv"])
            out[f"{block}.attn.out_proj.{end}"] = state[f"{layer}.self_attn.out_proj.{end}"]
            for theirs, ours in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                out[f"{block}.{ours}.{end}"] = state[f"{layer}.{theirs}.{end}"]
    if spare_layer:
        last = f"transformer.resblocks.{layers - 1}."
        out |= {k.replace(last, f"transformer.resblocks.{layers}."): torch.randn_like(v) for k, v in out.items() if k.startswith(last)}
    return {prefix + k: v for k, v in out.items()}
