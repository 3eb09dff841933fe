"""diffusers' own classes, tiny, by the family's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .probe import TOKENS, WIDTH, Texts, Tiny, seeded

CONTEXT = (TOKENS, WIDTH)
SQUARE, VIDEO, PACKED = (4, 8, 8), (4, 1, 8, 8), (16, 16)
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
STREAMS: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": WIDTH, **HEADS}
Call = Callable[[Tensor, Tensor, Texts], Any]


def ids(count: int, side: int = 4, axes: int = 3) -> Tensor:
    """Places of so many texts' tokens (0) or of a square picture's (row and column)."""
    places = torch.zeros(count, axes)
    places[:, 1], places[:, 2] = torch.arange(count) // side, torch.arange(count) % side
    return places


def ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), TOKENS, dtype=torch.bool)


def _flux1() -> Tiny:
    model = diffusers.FluxTransformer2DModel(in_channels=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), **STREAMS)

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        places = {"img_ids": ids(16), "txt_ids": torch.zeros(TOKENS, 3)}
        return model(x, texts["context"], texts["pooled"], t, **places, return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": CONTEXT, "pooled": (16,)})


def _flux2() -> Tiny:
    model = diffusers.Flux2Transformer2DModel(in_channels=16, timestep_guidance_channels=16, axes_dims_rope=(4,) * 4, **STREAMS)

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        places = {"img_ids": ids(16, axes=4), "txt_ids": torch.zeros(TOKENS, 4)}
        return model(x, texts["context"], t, **places, guidance=torch.full_like(t, 3.5), return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": CONTEXT})


def _chroma() -> Tiny:
    small = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model = diffusers.ChromaTransformer2DModel(in_channels=16, axes_dims_rope=(4, 6, 6), **small, **STREAMS)

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        mask = torch.ones(len(x), TOKENS + 16, dtype=torch.bool)
        places = {"img_ids": ids(16), "txt_ids": torch.zeros(TOKENS, 3)}
        return model(x, texts["context"], t, **places, attention_mask=mask, return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": CONTEXT})


def _sd3() -> Tiny:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=WIDTH, caption_projection_dim=32,
        pooled_projection_dim=16, pos_embed_max_size=8, **HEADS,
    )  # fmt: skip
    call = lambda x, t, texts: model(x, texts["context"], texts["pooled"], t, return_dict=False)[0]  # noqa: E731
    return Tiny(model, call, SQUARE, {"context": CONTEXT, "pooled": (16,)})


def _auraflow() -> Tiny:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=WIDTH, caption_projection_dim=32,
        pos_embed_max_size=64, **HEADS,
    )  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, texts["context"], t, return_dict=False)[0], SQUARE, {"context": CONTEXT})


def _qwen_image() -> Tiny:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **HEADS
    )

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        sizes = [[(1, 4, 4)]] * len(x)
        return model(x, texts["context"], ones(x), t, img_shapes=sizes, return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": CONTEXT})


def _qwen_image21() -> Tiny:
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6), **HEADS
    )

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        slots = torch.cat([torch.zeros(len(x), TOKENS, dtype=torch.bool), torch.ones(len(x), 4, dtype=torch.bool)], dim=1)
        return model(x, texts["context"], t[:1], [[(1, 4, 4)]] * len(x), slots, return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": CONTEXT})


def _z_image() -> Tiny:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=2, n_heads=16, n_kv_heads=16, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64]
    )
    call = lambda x, t, texts: model(list(x[:, :, None]), t, list(texts["context"]), return_dict=False)[0]  # noqa: E731
    return Tiny(model, call, SQUARE, {"context": CONTEXT})


def _lumina2() -> Tiny:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=256, num_layers=2, num_attention_heads=16, num_kv_heads=16, multiple_of=8,
        axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, t, texts["context"], ones(x), return_dict=False)[0], SQUARE, {"context": CONTEXT})


def _krea2() -> Tiny:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        places = torch.cat([torch.zeros(TOKENS, 3), ids(16)])
        return model(x, texts["context"].unflatten(-1, (3, 16)), t, places, return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": (TOKENS, 3 * 16)})


def _hidream() -> Tiny:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=16, num_single_layers=32, caption_channels=[WIDTH, 16], text_emb_dim=20,
        num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 6, 6), max_resolution=(16, 16), llama_layers=list(range(48)),
        force_inference_output=True, **HEADS,
    )  # fmt: skip

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        return model(x, t, texts["context"], texts["llama"].transpose(0, 1), texts["pooled"], return_dict=False)[0]

    return Tiny(model, call, SQUARE, {"context": CONTEXT, "llama": (48, TOKENS, 16), "pooled": (20,)})


def _hunyuan_video() -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH,
        pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), **HEADS,
    )  # fmt: skip

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        return model(x, t, texts["context"], ones(x), texts["pooled"], torch.full_like(t, 6.0), return_dict=False)[0]

    return Tiny(model, call, VIDEO, {"context": CONTEXT, "pooled": (16,)})


def _kandinsky5() -> Tiny:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_text_dim=WIDTH,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        places = [torch.arange(1), torch.arange(4), torch.arange(4)]
        channels_last = x.permute(0, 2, 3, 4, 1)
        return model(channels_last, texts["context"], t, texts["pooled"], places, torch.arange(TOKENS)).sample

    return Tiny(model, call, VIDEO, {"context": CONTEXT, "pooled": (16,)})


def _cosmos_predict2() -> Tiny:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=WIDTH, adaln_lora_dim=8, max_size=(4, 16, 16),
        extra_pos_embed_type=None, **HEADS,
    )  # fmt: skip
    call = lambda x, t, texts: model(x, t, texts["context"], padding_mask=x.new_zeros(1, 1, 8, 8), return_dict=False)[0]  # noqa: E731
    return Tiny(model, call, VIDEO, {"context": CONTEXT})


def _wan() -> Tiny:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, 1000 * t, texts["context"], return_dict=False)[0], VIDEO, {"context": CONTEXT})


def _pixart() -> Tiny:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, cross_attention_dim=32, sample_size=8, caption_channels=WIDTH,
        use_additional_conditions=False,
    )  # fmt: skip
    call = lambda x, t, texts: model(x, texts["context"], 1000 * t, {"resolution": None, "aspect_ratio": None}, return_dict=False)[0]  # noqa: E731
    return Tiny(model, call, SQUARE, {"context": CONTEXT})


def _ltxv() -> Tiny:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, cross_attention_dim=32, num_layers=2, caption_channels=WIDTH, **HEADS
    )

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        return model(x, texts["context"], 1000 * t, ones(x), num_frames=1, height=4, width=4, return_dict=False)[0]

    return Tiny(model, call, PACKED, {"context": CONTEXT})


def _sana() -> Tiny:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH, sample_size=8,
    )  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, texts["context"], 1000 * t, return_dict=False)[0], SQUARE, {"context": CONTEXT})


def _hunyuan_dit() -> Tiny:
    model = diffusers.HunyuanDiT2DModel(
        in_channels=4, patch_size=2, sample_size=16, hidden_size=32, num_layers=4, mlp_ratio=2.0, cross_attention_dim=WIDTH,
        cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=TOKENS, text_len_t5=6, use_style_cond_and_image_meta_size=False,
        **HEADS,
    )  # fmt: skip

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        turns = (torch.ones(64, 16), torch.zeros(64, 16))
        masks = torch.ones(len(x), TOKENS), torch.ones(len(x), 6)
        return model(x, 1000 * t, texts["context"], masks[0], texts["t5"], masks[1], image_rotary_emb=turns, return_dict=False)[0]

    return Tiny(model, call, (4, 16, 16), {"context": CONTEXT, "t5": (6, 16)})


def _unet(**more: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=2, norm_num_groups=8, **more,
    )  # fmt: skip


def _sd1() -> Tiny:
    model = _unet(cross_attention_dim=WIDTH)
    return Tiny(model, lambda x, t, texts: model(x, 1000 * t, texts["context"], return_dict=False)[0], SQUARE, {"context": CONTEXT})


def _sdxl(width: int = WIDTH, **more: Any) -> Tiny:
    label = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    model = _unet(cross_attention_dim=width, **label, **more)

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        added = {"text_embeds": texts["pooled"], "time_ids": torch.zeros(len(x), 6, dtype=x.dtype)}
        return model(x, 1000 * t, texts["context"], added_cond_kwargs=added, return_dict=False)[0]

    return Tiny(model, call, SQUARE, {"context": CONTEXT, "pooled": (16,)})


def _kolors() -> Tiny:
    return _sdxl(32, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj")


MODELS: dict[str, Callable[[], Tiny]] = {
    name.removeprefix("_"): build
    for name, build in list(globals().items())
    if name.startswith("_") and not name.startswith("__") and name != "_unet"
}


@cache
def build(family: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """The family's model."""
    with torch.random.fork_rng():
        tiny = MODELS[family]()
    seeded(tiny.model)
    whole: Sequence[str] = getattr(tiny.model, "_keep_in_fp32_modules", None) or ()
    for name, weight in tiny.model.named_parameters():
        if not set(name.split(".")) & set(whole):  # as from_pretrained does
            weight.data = weight.data.to(dtype)
    return tiny
