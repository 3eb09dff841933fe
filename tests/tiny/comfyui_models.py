"""ComfyUI's own classes, tiny, by the family's file; ``comfy`` must be importable and started."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .probe import TOKENS, WIDTH, Texts, Tiny, seeded

CONTEXT = (TOKENS, WIDTH)
SQUARE, VIDEO = (4, 8, 8), (4, 1, 8, 8)
FLUX: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "mlp_ratio": 2.0,
    "context_in_dim": WIDTH, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
NEXT: dict[str, Any] = {
    "patch_size": 2, "in_channels": 4, "dim": 256, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 16, "n_kv_heads": 16, "multiple_of": 8,
    "norm_eps": 1e-5, "qk_norm": True, "axes_dims": [4, 6, 6], "axes_lens": [64, 64, 64],
}  # fmt: skip
Parts = dict[str, Any]


class MissingError(Exception):
    """This ComfyUI is too old for a model."""


def known(parameters: type, values: Parts) -> Parts:
    """Without those that came with a later ComfyUI than this one; they change nothing that text is read by."""
    later = {"txt_ids_dims", "meanflow_sum", "vec_in_dim"}
    return {name: value for name, value in values.items() if name in parameters.__dataclass_fields__ or name not in later}


def full(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, dtype=x.dtype)


def plain(model: Any) -> Callable[[Tensor, Tensor, Texts], Any]:
    return lambda x, t, texts: model(x, t, texts["context"])


def pooled(model: Any) -> Callable[[Tensor, Tensor, Texts], Any]:
    return lambda x, t, texts: model(x, t, texts["context"], y=texts["pooled"])


def guided(model: Any) -> Callable[[Tensor, Tensor, Texts], Any]:
    return lambda x, t, texts: model(x, t, texts["context"], guidance=full(x, 3.5))


def _flux1(k: Parts) -> Tiny:
    from comfy.ldm.flux.model import Flux, FluxParams

    model = Flux(**known(FluxParams, FLUX), vec_in_dim=16, guidance_embed=True, **k)
    call = lambda x, t, texts: model(x, t, texts["context"], y=texts["pooled"], guidance=full(x, 3.5))  # noqa: E731
    return Tiny(model, call, SQUARE, {"context": CONTEXT, "pooled": (16,)})


def _flux2(k: Parts) -> Tiny:
    from comfy.ldm.flux.model import Flux, FluxParams

    own = {"axes_dim": [4] * 4, "theta": 2000, "patch_size": 1, "qkv_bias": False, "txt_ids_dims": [3], "mlp_ratio": 3.0}
    flags = {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "guidance_embed": True}
    model = Flux(**known(FluxParams, FLUX | own | flags), vec_in_dim=None, **k)
    return Tiny(model, guided(model), SQUARE, {"context": CONTEXT})


def _chroma(k: Parts) -> Tiny:
    from comfy.ldm.chroma.model import Chroma, ChromaParams

    own = {"in_channels": 16, "out_channels": 16, "in_dim": 64, "out_dim": 32, "hidden_dim": 16, "n_layers": 1, "vec_in_dim": None}
    model = Chroma(**known(ChromaParams, FLUX | own), **k)
    return Tiny(model, guided(model), SQUARE, {"context": CONTEXT})


def _sd3(k: Parts) -> Tiny:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
    model = OpenAISignatureMMDITWrapper(
        input_size=None, pos_embed_max_size=16, num_patches=256, in_channels=4, out_channels=4, patch_size=2, depth=2, adm_in_channels=16,
        context_embedder_config=embedder, **k,
    )  # fmt: skip
    return Tiny(model, pooled(model), SQUARE, {"context": CONTEXT, "pooled": (16,)})


def _auraflow(k: Parts) -> Tiny:
    from comfy.ldm.aura.mmdit import MMDiT

    model = MMDiT(
        in_channels=4, out_channels=4, patch_size=2, dim=256, n_layers=3, n_double_layers=1, n_heads=2, cond_seq_dim=WIDTH, max_seq=64, **k
    )
    return Tiny(model, plain(model), SQUARE, {"context": CONTEXT})


def _qwen_image(k: Parts) -> Tiny:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), **k,
    )  # fmt: skip
    return Tiny(model, plain(model), VIDEO, {"context": CONTEXT})


def _z_image(k: Parts) -> Tiny:
    from comfy.ldm.lumina.model import NextDiT

    model = NextDiT(**NEXT, cap_feat_dim=WIDTH, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=4, **k)
    return Tiny(model, lambda x, t, texts: model(x, t, texts["context"], num_tokens=TOKENS), SQUARE, {"context": CONTEXT})


def _lumina2(k: Parts) -> Tiny:
    from comfy.ldm.lumina.model import NextDiT

    model = NextDiT(**NEXT, cap_feat_dim=WIDTH, **k)
    return Tiny(model, lambda x, t, texts: model(x, t, texts["context"], num_tokens=TOKENS), SQUARE, {"context": CONTEXT})


def _omnigen2(k: Parts) -> Tiny:
    from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel

    model = OmniGen2Transformer2DModel(
        patch_size=2, in_channels=4, hidden_size=256, num_layers=2, num_refiner_layers=1, num_attention_heads=16, num_kv_heads=16,
        multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64), text_feat_dim=WIDTH, **k,
    )  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, t, texts["context"], num_tokens=TOKENS), SQUARE, {"context": CONTEXT})


def _krea2(k: Parts) -> Tiny:
    from comfy.ldm.krea2.model import SingleStreamDiT

    model = SingleStreamDiT(
        features=64, tdim=16, txtdim=16, heads=2, kvheads=1, multiplier=2, layers=2, patch=2, channels=4, txtlayers=3, txtheads=2,
        txtkvheads=2, **k,
    )  # fmt: skip
    return Tiny(model, plain(model), SQUARE, {"context": (TOKENS, 3 * 16)})


def _hidream(k: Parts) -> Tiny:
    from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel

    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=16, num_single_layers=32, attention_head_dim=16, num_attention_heads=2,
        caption_channels=[WIDTH, 16], text_emb_dim=20, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=[4, 6, 6],
        max_resolution=[16, 16], llama_layers=list(range(48)), **k,
    )  # fmt: skip

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        return model(x, t, y=texts["pooled"], context=texts["context"], encoder_hidden_states_llama3=texts["llama"])

    return Tiny(model, call, SQUARE, {"context": CONTEXT, "llama": (48, TOKENS, 16), "pooled": (20,)})


def _hunyuan_video(k: Parts) -> Tiny:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    own = {"patch_size": [1, 2, 2], "theta": 256, "vec_in_dim": 16, "guidance_embed": True}
    more = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    model = HunyuanVideo(**known(HunyuanVideoParams, {n: v for n, v in FLUX.items() if n != "txt_ids_dims"} | own | more), **k)
    call = lambda x, t, texts: model(x, t, texts["context"], y=texts["pooled"], guidance=full(x, 6.0))  # noqa: E731
    return Tiny(model, call, VIDEO, {"context": CONTEXT, "pooled": (16,)})


def _kandinsky5(k: Parts) -> Tiny:
    from comfy.ldm.kandinsky5.model import Kandinsky5

    model = Kandinsky5(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=48, visual_embed_dim=16,
        patch_size=(1, 2, 2), num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), **k,
    )  # fmt: skip
    return Tiny(model, pooled(model), VIDEO, {"context": CONTEXT, "pooled": (16,)})


def _cosmos_predict2(k: Parts) -> Tiny:
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    model = MiniTrainDIT(
        max_img_h=16, max_img_w=16, max_frames=4, in_channels=4, out_channels=4, patch_spatial=2, patch_temporal=1, model_channels=36,
        num_blocks=2, num_heads=2, crossattn_emb_channels=WIDTH, pos_emb_cls="rope3d", use_adaln_lora=True, adaln_lora_dim=8,
        concat_padding_mask=True, min_fps=1, max_fps=30, **k,
    )  # fmt: skip
    return Tiny(model, plain(model), VIDEO, {"context": CONTEXT})


def _wan(k: Parts) -> Tiny:
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=TOKENS, in_dim=4, dim=36, ffn_dim=48, freq_dim=16, text_dim=WIDTH, out_dim=4,
        num_heads=2, num_layers=2, **k,
    )  # fmt: skip
    return Tiny(model, plain(model), VIDEO, {"context": CONTEXT})


def _pixart(k: Parts) -> Tiny:
    from comfy.ldm.pixart.pixartms import PixArtMS

    model = PixArtMS(
        input_size=8, patch_size=2, in_channels=4, hidden_size=36, depth=2, num_heads=2, caption_channels=WIDTH, model_max_length=TOKENS,
        micro_condition=False, **k,
    )  # fmt: skip
    return Tiny(model, plain(model), (4, 64, 64), {"context": CONTEXT})


def _ltxv(k: Parts) -> Tiny:
    from comfy.ldm.lightricks.model import LTXVModel

    model = LTXVModel(in_channels=4, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2, caption_channels=WIDTH,
                      num_layers=2, **k)  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, t, texts["context"], None), VIDEO, {"context": CONTEXT})


def _ltx2(k: Parts) -> Tiny:
    from comfy.ldm.lightricks.model import LTXVModel

    if "cross_attention_adaln" not in inspect.signature(LTXVModel.__init__).parameters:
        raise MissingError("LTX-2")
    model = LTXVModel(in_channels=4, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2, caption_channels=WIDTH,
                      num_layers=2, cross_attention_adaln=True, **k)  # fmt: skip
    return Tiny(model, lambda x, t, texts: model(x, t, texts["context"], None), VIDEO, {"context": CONTEXT})


def _hunyuan_dit(k: Parts) -> Tiny:
    from comfy.ldm.hydit.models import HunYuanDiT

    model = HunYuanDiT(
        input_size=32, patch_size=2, in_channels=4, hidden_size=32, depth=4, num_heads=2, mlp_ratio=2.0, text_states_dim=WIDTH,
        text_states_dim_t5=16, text_len=TOKENS, text_len_t5=6, qk_norm=True, size_cond=False, use_style_cond=False, learn_sigma=True,
        norm="layer", **k,
    )  # fmt: skip

    def call(x: Tensor, t: Tensor, texts: Texts) -> Any:
        masks = {"text_embedding_mask": torch.ones(len(x), TOKENS), "text_embedding_mask_t5": torch.ones(len(x), 6)}
        return model(x, t, texts["context"], encoder_hidden_states_t5=texts["t5"], image_meta_size=torch.zeros(len(x), 6), **masks)

    return Tiny(model, call, (4, 16, 16), {"context": CONTEXT, "t5": (6, 16)})


def _unet(k: Parts, **more: Any) -> Any:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=2,
        use_spatial_transformer=True, transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1,
        context_dim=WIDTH, use_linear_in_transformer=True, **more, **k,
    )  # fmt: skip


def _sd1(k: Parts) -> Tiny:
    model = _unet(k)
    return Tiny(model, lambda x, t, texts: model(x, 1000 * t, texts["context"]), SQUARE, {"context": CONTEXT})


def _sdxl(k: Parts) -> Tiny:
    model = _unet(k, num_classes="sequential", adm_in_channels=16)
    call = lambda x, t, texts: model(x, 1000 * t, texts["context"], y=texts["pooled"])  # noqa: E731
    return Tiny(model, call, SQUARE, {"context": CONTEXT, "pooled": (16,)})


MODELS: dict[str, Callable[[Parts], Tiny]] = {
    name.removeprefix("_"): build
    for name, build in list(globals().items())
    if name.startswith("_") and not name.startswith("__") and name != "_unet"
}


@cache
def build(family: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """The family's model.

    Raises:
        MissingError: this ComfyUI has no such model.
    """
    import comfy.ops

    try:
        tiny = MODELS[family]({"dtype": dtype, "device": "cpu", "operations": comfy.ops.manual_cast})
    except ModuleNotFoundError as error:
        raise MissingError(family) if (error.name or "").startswith("comfy.ldm.") else error from None
    seeded(tiny.model)
    return tiny
