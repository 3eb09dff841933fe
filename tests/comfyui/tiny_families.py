"""A node pack: ComfyUI's own models and text encoders of families beyond Stable Diffusion, tiny, their weights from one seed.

Text encoders have their own tokenizers, templates and lengths; what is small is their width. It is put into a server's custom_nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

WIDTH = 64
T5 = {"d_model": WIDTH, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
LLM = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
CLIP_L = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
NEXT = {
    "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 16, "n_kv_heads": 16,
    "multiple_of": 8, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [512, 64, 64],
}  # fmt: skip


class Family(NamedTuple):
    """A class of ComfyUI's ``supported_models``, a size of it, and its text encoder: module, its tokenizer, what makes its class, sizes."""

    config: str
    unet: dict[str, Any]
    module: str
    tokenizer: str
    encoder: str
    sizes: dict[str, dict[str, Any]]


FAMILIES = {
    "flux": Family("Flux", FLUX, "flux", "FluxTokenizer", "flux_clip", {"t5xxl": T5, "clip_l": CLIP_L}),
    "qwen_image": Family(
        "QwenImage",
        {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": WIDTH, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
        },
        "qwen_image", "QwenImageTokenizer", "te", {"qwen25_7b": LLM | {"num_attention_heads": 2}},
    ),
    "z_image": Family("ZImage", NEXT | {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 4}, "z_image",
                      "ZImageTokenizer", "te", {"qwen3_4b": LLM}),
    "wan": Family(
        "WAN21_T2V",
        {
            "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": 512, "in_dim": 16, "dim": 36, "ffn_dim": 48, "freq_dim": 16,
            "text_dim": WIDTH, "out_dim": 16, "num_heads": 2, "num_layers": 2,
        },
        "wan", "WanT5Tokenizer", "te", {"umt5xxl": T5},
    ),
    "anima": Family(
        "Anima",
        {
            "max_img_h": 64, "max_img_w": 64, "max_frames": 4, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
            "patch_temporal": 1, "model_channels": 36, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 1024,
            "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8, "concat_padding_mask": True, "min_fps": 1, "max_fps": 30,
        },
        "anima", "AnimaTokenizer", "te", {"qwen3_06b": LLM | {"hidden_size": 1024}},
    ),
}  # fmt: skip


def available(name: str) -> bool:
    """Whether this ComfyUI has the family."""
    return hasattr(comfy.supported_models, FAMILIES[name].config)


def build(name: str) -> tuple[Any, Any]:
    """MODEL and CLIP."""
    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)({"image_model": name} | family.unet)
    config.set_inference_dtype(torch.float32, None)
    del config.unet_config["image_model"]
    if name == "flux" and "txt_ids_dims" in import_module("comfy.ldm.flux.model").FluxParams.__dataclass_fields__:  # of later versions
        config.unet_config["txt_ids_dims"] = []
    model = config.get_model({}, "")
    _seed(model.diffusion_model, 1)
    device = comfy.model_management.get_torch_device()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=device, offload_device=torch.device("cpu")), clip(family)


def clip(family: Family) -> Any:
    """CLIP."""
    module = import_module(f"comfy.text_encoders.{family.module}")
    make: Callable[[], Any] = getattr(module, family.encoder)
    target = comfy.supported_models_base.ClipTarget(getattr(module, family.tokenizer), make())
    sizes: dict[str, Any] = {f"{encoder}_model_config": size for encoder, size in family.sizes.items()}
    data = {}
    if name := next((n for n in family.sizes if n.startswith("umt5")), None):  # whose vocabulary lies in the file of its weights
        folder = import_module("comfy.text_encoders.aura_t5").__file__
        with open(str(folder).replace("aura_t5.py", "t5_pile_tokenizer/tokenizer.model"), "rb") as file:
            data["spiece_model"] = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        sizes[f"{name}_model_config"] = sizes[f"{name}_model_config"] | {"vocab_size": 40000}
    made = comfy.sd.CLIP(target, tokenizer_data=data, parameters=1000, model_options={"dtype": torch.float32} | sizes)
    _seed(made.cond_stage_model, 2)
    return made


def _seed(model: torch.nn.Module, seed: int) -> None:
    """Weights from one seed; norms about 1, embeddings of norm 1 a channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".visual." in name:  # reads pictures, and has its full size
            continue
        plain = weight.dim() < 2
        scale = 0.1 if plain else 1.0 if "embed" in name or "shared" in name else weight[0].numel() ** -0.5
        value = torch.randn(weight.shape, generator=generator) * scale
        weight.data = (value + (plain and "norm" in name and name.endswith("weight"))).to(weight.dtype)


class TinyFamily:
    """The loader."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ([n for n in FAMILIES if available(n)],)}}

    def load(self, name: str) -> tuple[Any, Any]:
        return build(name)


NODE_CLASS_MAPPINGS = {"TinyFamily": TinyFamily}
