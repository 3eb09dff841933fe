"""The embedded model as an ordinary ComfyUI MODEL, CLIP and VAE: no download, no GPU, all stock nodes."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from PIL import Image

from ...sepme import demo

FOLDER = Path(demo.__file__).parent / "model"


def demo_model() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the embedded model; pictures of 128 x 128 pixels, latents of 16 x 16."""
    return _unet(), _clip(), _vae()


def _read(part: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((FOLDER / part / "config.json").read_text(encoding="utf-8"))
    (file,) = (FOLDER / part).glob("*.safetensors")
    return config, {k: v.float() for k, v in comfy.utils.load_torch_file(str(file), safe_load=True).items()}


class DemoLatents(comfy.latent_formats.LatentFormat):
    """The embedded model's; its decoder is quick enough for previews."""

    @staticmethod
    def picture(latents: torch.Tensor) -> Image.Image:
        pixels = _decoder().decode(latents.to("cpu", torch.float32))[0].movedim(0, -1)
        return Image.fromarray((pixels / 2 + 0.5).clamp(0, 1).mul(255).byte().numpy())


@lru_cache(maxsize=1)
def _decoder() -> Any:
    return _vae().first_stage_model


def _unet() -> Any:
    config, state = _read("unet")
    channels, blocks = config["block_out_channels"], config["layers_per_block"]
    depth = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"]]

    class Demo(comfy.supported_models.SD15):
        unet_config: dict[str, Any] = {}  # noqa: RUF012
        unet_extra_config = {"num_heads": config["attention_head_dim"], "num_head_channels": -1}  # noqa: RUF012
        latent_format = DemoLatents

    model_config = Demo(
        {
            "image_size": config["sample_size"],
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "model_channels": channels[0],
            "channel_mult": [c // channels[0] for c in channels],
            "num_res_blocks": [blocks] * len(channels),
            "transformer_depth": [d for d in depth for _ in range(blocks)],
            "transformer_depth_output": [d for d in depth for _ in range(blocks + 1)],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "legacy": False,
            "context_dim": config["cross_attention_dim"],
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
        }
    )
    model_config.set_inference_dtype(torch.float32, None)
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)
    model = model_config.get_model({}, "")
    model.diffusion_model.load_state_dict({names[k]: v for k, v in state.items()}, strict=True)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    device = comfy.model_management.get_torch_device()
    return patcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())


def _clip() -> Any:
    config, state = _read("text_encoder")
    width, size = config["hidden_size"], config["vocab_size"]
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}

    class TextModel(comfy.clip_model.CLIPTextModel):
        """ComfyUI's has CLIP's vocabulary fixed."""

        def __init__(self, config_dict: Any, dtype: Any, device: Any, operations: Any) -> None:
            super().__init__(config_dict, dtype, device, operations)
            self.set_input_embeddings(operations.Embedding(size, width, dtype=dtype, device=device))

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device, dtype=dtype, textmodel_json_config=config, model_class=TextModel, special_tokens=special,
                return_projected_pooled=False, model_options=model_options or {},
            )  # fmt: skip

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, clip_name="l", clip_model=Encoder, model_options=model_options or {})

    class OneTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                str(FOLDER / "tokenizer"), max_length=config["max_position_embeddings"], embedding_directory=embedding_directory,
                embedding_size=width, embedding_key="clip_l", tokenizer_data=tokenizer_data or {},
            )  # fmt: skip

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, clip_name="l", tokenizer=OneTokenizer)

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Model)
    parameters = sum(v.numel() for v in state.values())
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options={"dtype": torch.float32})
    named = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()}
    missing, unexpected = clip.load_sd(named | {"text_projection.weight": torch.eye(width)})
    if unexpected or set(missing) - {"logit_scale"}:
        raise RuntimeError(f"the embedded text encoder does not load: {missing} {unexpected}")
    return clip


def _vae() -> Any:
    _, state = _read("vae")
    width = len(state["encoder.layers.0.weight"])
    names = {}
    for key in state:
        side, _, index, rest = key.split(".", 3)
        names[key] = f"taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"
    return comfy.sd.VAE(sd={names[k]: _widened(v, width) for k, v in state.items()}, dtype=torch.float32)


def _widened(weight: torch.Tensor, width: int, host: int = 64) -> torch.Tensor:
    """A TAESD weight of ``width`` channels as one of the host's fixed width: the channels that it adds are all zero, and stay so."""
    sides = [(0, host - width if size == width else 0) for size in weight.shape]
    return torch.nn.functional.pad(weight, [n for side in reversed(sides) for n in side])
