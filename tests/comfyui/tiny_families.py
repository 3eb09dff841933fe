"""A node pack: ComfyUI's own models and text encoders of families beyond Stable Diffusion, tiny, their weights from one seed.

Text encoders have their own tokenizers, templates and lengths; what is small is their width. It is put into a server's custom_nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
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
CLIP_L = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
NEXT = {
    "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 16, "n_kv_heads": 16,
    "multiple_of": 8, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [512, 64, 64],
}  # fmt: skip


COSMOS = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 4, "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 36, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "use_adaln_lora": True,
    "adaln_lora_dim": 8, "concat_padding_mask": True, "min_fps": 1, "max_fps": 30,
}  # fmt: skip

LATER: dict[str, dict[str, Any]] = {  # what versions of ComfyUI have that came after 0.3.75
    "flux": {"txt_ids_dims": []}, "flux2": {"txt_ids_dims": [3]}, "hunyuan_video": {"meanflow_sum": False},
}  # fmt: skip


class Family(NamedTuple):
    """A class of ComfyUI's ``supported_models``, a size of it, and its text encoder: module, its tokenizer, its class or what makes it,
    sizes."""

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
        "Anima", COSMOS, "anima", "AnimaTokenizer", "te", {"qwen3_06b": LLM | {"hidden_size": 1024}},
    ),
    "cosmos_predict2": Family(
        "CosmosT2IPredict2", COSMOS | {"crossattn_emb_channels": WIDTH}, "cosmos", "CosmosT5Tokenizer", "te", {"t5xxl": T5},
    ),
    "pixart": Family(
        "PixArtAlpha",
        {
            "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 36, "depth": 2, "num_heads": 2, "caption_channels": WIDTH,
            "model_max_length": 120, "micro_condition": False,
        },
        "pixart_t5", "PixArtTokenizer", "pixart_te", {"t5xxl": T5},
    ),
    "ltxv": Family(
        "LTXV",
        {
            "in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": WIDTH,
            "num_layers": 2,
        },
        "lt", "LTXVT5Tokenizer", "ltxv_te", {"t5xxl": T5},
    ),
    "hunyuan_dit": Family(
        "HunyuanDiT",
        {
            "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0,
            "text_states_dim": 256, "text_states_dim_t5": WIDTH, "text_len": 77, "text_len_t5": 256, "qk_norm": True, "size_cond": False,
            "use_style_cond": False, "learn_sigma": True, "norm": "layer",
        },
        "hydit", "HyditTokenizer", "HyditModel", {"hydit_clip": CLIP_L | {"hidden_size": 256}, "mt5xl": T5},
    ),
    "hidream": Family(
        "HiDream",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "caption_channels": [WIDTH, WIDTH], "text_emb_dim": 128, "num_routed_experts": 2,
            "num_activated_experts": 2, "axes_dims_rope": [4, 6, 6], "max_resolution": [16, 16], "llama_layers": [0, 1, 2, 2],
        },
        "hidream", "HiDreamTokenizer", "hidream_clip", {"clip_l": CLIP_L, "clip_g": CLIP_L, "t5xxl": T5, "llama": LLM},
    ),
    "sd3": Family(
        "SD3",
        {
            "input_size": None, "pos_embed_max_size": 16, "num_patches": 256, "in_channels": 16, "out_channels": 16, "patch_size": 2,
            "depth": 2, "adm_in_channels": 128,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
        },
        "sd3_clip", "SD3Tokenizer", "sd3_clip", {"clip_l": CLIP_L, "clip_g": CLIP_L, "t5xxl": T5 | {"d_model": 4096, "vocab_size": 512}},
    ),
    "hunyuan_video": Family(
        "HunyuanVideo",
        {
            **{n: v for n, v in FLUX.items() if n != "txt_ids_dims"}, "patch_size": [1, 2, 2], "theta": 256, "byt5": False,
            "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
        },
        "hunyuan_video", "HunyuanVideoTokenizer", "hunyuan_video_clip", {"clip_l": CLIP_L, "llama": LLM | {"num_hidden_layers": 4}},
    ),
    "flux2": Family(
        "Flux2",
        FLUX | {
            "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 3 * WIDTH, "axes_dim": [4] * 4, "theta": 2000,
            "patch_size": 1, "qkv_bias": False, "mlp_ratio": 3.0, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
        },
        "flux", "KleinTokenizer", "klein_te", {"qwen3_4b": LLM | {"num_hidden_layers": 28}},
    ),
    "kandinsky5": Family(
        "Kandinsky5",
        {
            "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": WIDTH, "in_text_dim2": 64, "time_dim": 16, "model_dim": 32,
            "ff_dim": 48, "visual_embed_dim": 132, "patch_size": (1, 2, 2), "num_text_blocks": 1, "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        "kandinsky5", "Kandinsky5Tokenizer", "te", {"qwen25_7b": LLM, "clip_l": CLIP_L},
    ),
    "krea2": Family(
        "Krea2",
        {
            "features": 64, "tdim": 16, "txtdim": WIDTH, "heads": 2, "kvheads": 1, "multiplier": 2, "layers": 2, "patch": 2,
            "channels": 16, "txtlayers": 12, "txtheads": 2, "txtkvheads": 2,
        },
        "krea2", "Krea2Tokenizer", "te", {"qwen3vl_4b": LLM | {"num_hidden_layers": 36}},
    ),
}  # fmt: skip


def available(name: str) -> bool:
    """Whether this ComfyUI has the family, and its text encoder; copies of it may lack Llama's tokenizer, a large file."""
    family = FAMILIES[name]
    if not hasattr(comfy.supported_models, family.config):
        return False
    module = import_module(f"comfy.text_encoders.{family.module}")
    vocabulary = Path(str(module.__file__)).parent / "llama_tokenizer" / "tokenizer.json"
    return hasattr(module, family.tokenizer) and ("llama" not in family.sizes or vocabulary.is_file())


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """MODEL and CLIP."""
    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)({"image_model": name} | family.unet)
    config.set_inference_dtype(dtype, None)
    del config.unet_config["image_model"]
    for field, value in LATER.get(name, {}).items():
        module = import_module(f"comfy.ldm.{'hunyuan_video' if name == 'hunyuan_video' else 'flux'}.model")
        if any(field in vars(part).get("__dataclass_fields__", ()) for part in vars(module).values() if isinstance(part, type)):
            config.unet_config[field] = value
    model = config.get_model({}, "")
    _seed(model.diffusion_model, 1)
    device = comfy.model_management.get_torch_device()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=device, offload_device=torch.device("cpu")), clip(family)


def clip(family: Family, spiece: bytes | None = None) -> Any:
    """CLIP.

    Args:
        spiece: a SentencePiece vocabulary, of encoders whose file holds it; Pile-T5's if not given.
    """
    module = import_module(f"comfy.text_encoders.{family.module}")
    make: Callable[..., Any] = getattr(module, family.encoder)
    made = make if isinstance(make, type) else make()
    target = comfy.supported_models_base.ClipTarget(getattr(module, family.tokenizer), made)
    sizes: dict[str, Any] = {f"{encoder}_model_config": size for encoder, size in family.sizes.items()}
    data = {}
    if name := next((n for n in family.sizes if "mt5" in n), None):  # whose vocabulary lies in the file of its weights
        folder = import_module("comfy.text_encoders.aura_t5").__file__
        spiece = spiece or Path(str(folder).replace("aura_t5.py", "t5_pile_tokenizer/tokenizer.model")).read_bytes()
        sizes[f"{name}_model_config"] = sizes[f"{name}_model_config"] | {"vocab_size": 40000}
    if spiece is not None:
        data["spiece_model"] = data["mt5xl.spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    clip = comfy.sd.CLIP(target, tokenizer_data=data, parameters=1000, model_options={"dtype": torch.float32} | sizes)
    _seed(clip.cond_stage_model, 2)
    if family.config == "SD3":  # whose T5 has 4096 channels in every size
        transformer = clip.cond_stage_model.t5xxl.transformer
        transformer.shared = Folded(transformer.shared.weight)
    return clip


class Folded(torch.nn.Module):
    """An embedding of fewer tokens than the tokenizer has."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.nn.functional.embedding(ids % len(self.weight), self.weight).to(out_dtype)


def _seed(model: torch.nn.Module, seed: int) -> None:
    """Weights from one seed; norms about 1, embeddings of norm 1 a channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".visual." in name:  # reads pictures, and has its full size
            continue
        plain = weight.dim() < 2
        scale = 0.1 if plain else 1.0 if "embed" in name or "shared" in name else weight[0].numel() ** -0.5
        value = torch.randn(weight.shape, generator=generator) * scale
        weight.data = (value + (plain and "norm" in name.lower() and name.endswith("weight"))).to(weight.dtype)
    for name, buffer in model.named_buffers():
        if name == "pos_embed":  # read from the checkpoint as well
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


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
