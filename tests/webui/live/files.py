"""Files that a whole WebUI is tried with: random checkpoints of Stable Diffusion 1.5's true layout, and a small LoRA for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ldm_files import save_single_file
from safetensors.torch import load_file, save_file
from torch import nn

HEARD = 6.0  # how much louder the text is than in a fresh network: two steps at 64 pixels must show it
LOUD = 4.0  # the same of what the decoder paints
RANK = 4


def checkpoint(path: Path, seed: int) -> Path:
    """A random checkpoint, float16, 2 GB; made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        save_single_file(_pipeline(), "sd1", part := path.with_suffix(".part"))
        part.rename(path)
    return path


def relative(path: Path, of: Path, seed: int) -> Path:
    """Another checkpoint, made once: the same but for the keys and values of its text."""
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(of)
        for name, weight in tensors.items():
            if ".attn2.to_k." in name or ".attn2.to_v." in name:
                tensors[name] = (weight.float() + 0.02 * torch.randn(weight.shape, generator=generator)).half()
        save_file(tensors, part := path.with_suffix(".part"))
        part.rename(path)
    return path


def _pipeline() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sepme.hosts import ldm

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
    )
    nn.init.normal_(next(w for n, w in text.named_parameters() if "token_embedding" in n), std=1.0)  # far apart, as training makes them
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".attn2.to_out.0.weight" in name:
                weight.mul_(HEARD)
        vae.decoder.conv_out.weight.mul_(LOUD)
    parts = {name: _Half(m) for name, m in (("unet", unet), ("vae", vae), ("text_encoder", text))}
    return type("Pipeline", (), {**parts, "scheduler": DDIMScheduler(**ldm.SCHEDULE)})()


class _Half:
    def __init__(self, module: nn.Module) -> None:
        self.state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state


def lora(path: Path, seed: int) -> Path:
    """A LoRA of the text's keys in all blocks of the way down."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block, width in ((0, 320), (1, 640), (2, 1280)):
        for layer in range(2):
            name = f"lora_unet_down_blocks_{block}_attentions_{layer}_transformer_blocks_0_attn2_to_k"
            tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, 768, generator=generator) / 8
            tensors[f"{name}.lora_up.weight"] = torch.randn(width, RANK, generator=generator) / 8
            tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
