"""Single-file checkpoints in the LDM layout: what a file's keys and shapes say it is, and the modules it holds.

Everything that the file says (widths, depths) is read from its header; the few facts that weights do not hold (heads, latent
scale, noise schedule) are those of the published models. Keys are renamed by diffusers' own conversion functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..errors import SepMEError, out_of_memory
from ..files import check_precision, first_line, refuse_pickle

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
FOREIGN = {  # other architectures, by a part of a key that only they have
    "Flux": "double_blocks.",
    "Stable Diffusion 3": "joint_blocks.",
    "the SDXL refiner": "conditioner.embedders.0.model.",
    "Stable Cascade": ".kv_mapper.",
    "PixArt or another diffusion transformer": "adaln_single.",
    "a ControlNet": "control_model.",
    "a LoRA": "lora_",
}
HEAD = 64  # channels of an attention head, all but SD 1.x's UNet, which has 8 heads everywhere
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

TensorShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """A single file of a kind that can be loaded: ``sd1``, ``sd2`` or ``sdxl``; nothing but its header has been read."""

    path: Path
    kind: str
    shapes: TensorShapes
    metadata: Mapping[str, str]

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read a file's header and find out what it is.

        Raises:
            SepMEError: a pickle, damaged, foreign, or without a part that is needed; the sentence says which.
        """
        refuse_pickle(path)
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise SepMEError(f"{path} is no safetensors file or is cut short ({first_line(error)}); get it again.") from None
        return Checkpoint(path, _kind(path, shapes), shapes, metadata)

    def read(self, *prefixes: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors under these prefixes, copied: where a tensor lies in the file must not decide which kernels add it up.

        Raises:
            SepMEError: the file changed or is damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in self.shapes if key.startswith(prefixes)}
                for key, tensor in tensors.items():
                    if not key.endswith("position_ids"):  # whole numbers, which nobody reads
                        check_precision(self.path, key, tensor.dtype)
                return {key: tensor.to(dtype, copy=True) for key, tensor in tensors.items()}
        except SepMEError:
            raise
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise SepMEError(f"{self.path} is damaged ({first_line(error)}); get it again.") from None

    def count(self, pattern: str) -> int:
        """How many numbers stand in the group of ``pattern`` (blocks, layers), over all keys."""
        return len({m[1] for m in map(re.compile(pattern).match, self.shapes) if m})


def _kind(path: Path, shapes: TensorShapes) -> str:
    for name, part in FOREIGN.items():
        if any(part in key for key in shapes):
            raise SepMEError(f"{path} holds {name}; only checkpoints of Stable Diffusion 1.x, 2.x and XL can be loaded.")
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None or len(first) != 4 or not any(".attn2.to_k.weight" in key for key in shapes):
        raise SepMEError(f"{path} holds no Stable Diffusion UNet (keys {UNET}input_blocks...); name a whole checkpoint.")
    if first[1] != 4:
        raise SepMEError(f"{path} reads {first[1]} latent channels (inpainting, editing); only text-to-image models (4) can be loaded.")
    if not any(key.startswith(f"{VAE}decoder.") for key in shapes):
        raise SepMEError(f"{path} holds no VAE (keys {VAE}decoder...); name a whole checkpoint.")
    classes = f"{UNET}label_emb.0.0.weight" in shapes
    present = {prefix for prefix in (CLIP, OPEN_CLIP, XL_CLIP, XL_OPEN_CLIP) if any(key.startswith(prefix) for key in shapes)}
    kinds = {("sd1", False): {CLIP}, ("sd2", False): {OPEN_CLIP}, ("sdxl", True): {XL_CLIP, XL_OPEN_CLIP}}
    for (kind, labelled), needed in kinds.items():
        if present == needed and classes == labelled:
            return kind
    missing = "both text encoders of SDXL (conditioner.embedders.0 and .1)" if classes else "a text encoder (cond_stage_model...)"
    raise SepMEError(f"{path} has a UNet of Stable Diffusion but not {missing} that goes with it; name a whole checkpoint.")


def unet(file: Checkpoint, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet, frozen at ``dtype``; its sample size is the published one (64 for SD 1.x and 2.x, 128 for SDXL)."""
    config = _unet_config(file)
    state = convert_ldm_unet_checkpoint(file.read(UNET, dtype=dtype), config)
    return _build(file, "UNet", lambda: UNet2DConditionModel(**config), state)


def _unet_config(file: Checkpoint) -> dict[str, Any]:
    blocks = file.count(rf"{re.escape(UNET)}input_blocks\.(\d+)\.")
    downs = [i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in file.shapes]
    starts = [1, *(i + 1 for i in downs)]
    channels, depths = [], []
    for i in starts:
        channels.append(_need(file, f"{UNET}input_blocks.{i}.0.out_layers.3.weight")[0])
        depths.append(file.count(rf"{re.escape(UNET)}input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\."))
    middle = file.count(rf"{re.escape(UNET)}middle_block\.1\.transformer_blocks\.(\d+)\.")
    context = next(shape[1] for key, shape in file.shapes.items() if key.startswith(UNET) and key.endswith(".attn2.to_k.weight"))
    proj_in = next(shape for key, shape in file.shapes.items() if key.startswith(UNET) and key.endswith(".1.proj_in.weight"))
    config: dict[str, Any] = {
        "sample_size": 128 if file.kind == "sdxl" else 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)),
        "block_out_channels": tuple(channels),
        "layers_per_block": (starts[1] if downs else blocks) - 1 - bool(downs),
        "transformer_layers_per_block": [*(d or 1 for d in depths[:-1]), depths[-1] or middle],
        "cross_attention_dim": context,
        "attention_head_dim": 8 if file.kind == "sd1" else [max(c // HEAD, 1) for c in channels],
        "use_linear_projection": len(proj_in) == 2,
        "upcast_attention": file.kind == "sd2",
    }
    if file.kind == "sdxl":
        labels = _need(file, f"{UNET}label_emb.0.0.weight")[1]
        pooled = _need(file, f"{XL_OPEN_CLIP}text_projection")[1]
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": labels,
            "addition_time_embed_dim": (labels - pooled) // 6,
        }
    return config


def vae(file: Checkpoint, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder."""
    levels = file.count(rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
    config = {
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(_need(file, f"{VAE}encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)),
        "layers_per_block": file.count(rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\."),
        "scaling_factor": 0.13025 if file.kind == "sdxl" else 0.18215,
        "force_upcast": file.kind == "sdxl",
    }
    state = convert_ldm_vae_checkpoint(file.read(VAE, dtype=dtype), config)
    return _build(file, "VAE", lambda: AutoencoderKL(**config), state)


def text_encoders(file: Checkpoint, dtype: torch.dtype, end: int) -> list[nn.Module]:
    """The text encoders in the order in which their channels stand in the context; ``end`` is the tokenizer's end token."""
    if file.kind == "sd1":
        return [_clip(file, CLIP, dtype, end)]
    if file.kind == "sd2":
        return [_open_clip(file, OPEN_CLIP, dtype, end, CLIPTextModel, skip=1)]
    return [_clip(file, XL_CLIP, dtype, end), _open_clip(file, XL_OPEN_CLIP, dtype, end, CLIPTextModelWithProjection, skip=0)]


def vocabulary(file: Checkpoint) -> int:
    """How many tokens the (first) text encoder knows."""
    if file.kind == "sd2":
        return _need(file, f"{OPEN_CLIP}token_embedding.weight")[0]
    return _need(file, f"{_clip_stem(file, CLIP if file.kind == 'sd1' else XL_CLIP)}embeddings.token_embedding.weight")[0]


def _clip_stem(file: Checkpoint, prefix: str) -> str:
    """Where CLIP's keys begin: some tools write them without ``text_model.``."""
    stem = f"{prefix}text_model."
    return stem if any(key.startswith(stem) for key in file.shapes) else prefix


def _clip_config(file: Checkpoint, tokens: str, positions: str, inner: str, layers: int, end: int, **more: Any) -> CLIPTextConfig:
    words, width = _need(file, tokens)
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=_need(file, inner)[0],
        num_hidden_layers=layers,
        num_attention_heads=max(width // HEAD, 1),
        max_position_embeddings=_need(file, positions)[0],
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        **more,
    )


def _clip(file: Checkpoint, prefix: str, dtype: torch.dtype, end: int) -> nn.Module:
    stem = _clip_stem(file, prefix)
    embeddings = f"{stem}embeddings."
    config = _clip_config(
        file, f"{embeddings}token_embedding.weight", f"{embeddings}position_embedding.weight",
        f"{stem}encoder.layers.0.mlp.fc1.weight", file.count(rf"{re.escape(stem)}encoder\.layers\.(\d+)\."), end, hidden_act="quick_gelu",
    )  # fmt: skip
    state = convert_ldm_clip_checkpoint(file.read(prefix, dtype=dtype))
    if stem == prefix:
        state = {f"text_model.{key}": value for key, value in state.items()}
    return _build(file, "text encoder", lambda: CLIPTextModel(config), state)


def _open_clip(file: Checkpoint, prefix: str, dtype: torch.dtype, end: int, build: Any, skip: int) -> nn.Module:
    """An OpenCLIP encoder without its last ``skip`` layers (SD 2.x reads the last but one)."""
    blocks = f"{prefix}transformer.resblocks."
    layers = file.count(rf"{re.escape(blocks)}(\d+)\.") - skip
    projection = {"projection_dim": _need(file, f"{prefix}text_projection")[1]} if build is CLIPTextModelWithProjection else {}
    config = _clip_config(
        file, f"{prefix}token_embedding.weight", f"{prefix}positional_embedding", f"{blocks}0.mlp.c_fc.weight", layers, end,
        hidden_act="gelu", **projection,
    )  # fmt: skip
    unread = tuple(f"{blocks}{layers + i}." for i in range(skip)) + (() if projection else (f"{prefix}text_projection",))
    state = {key: value for key, value in file.read(prefix, dtype=dtype).items() if not key.startswith(unread)}
    with torch.device("meta"):
        shell = build(config)  # the conversion asks it for its width
    return _build(file, "text encoder", lambda: build(config), convert_open_clip_checkpoint(shell, state, prefix))


def _need(file: Checkpoint, key: str) -> tuple[int, ...]:
    if key not in file.shapes:
        raise SepMEError(f"{file.path} lacks the tensor {key}; it is no complete checkpoint of Stable Diffusion.")
    return file.shapes[key]


def _build(file: Checkpoint, what: str, make: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A module that takes the tensors of ``state`` as its own, without a second copy.

    Raises:
        SepMEError: tensors are missing, left over or of other shapes.
    """
    try:
        with torch.device("meta"):
            module = make()
        if not hasattr(module, "text_model"):  # transformers >= 5.6 has no wrapper around CLIPTextModel
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        known = module.state_dict()
        wrong = [key for key in known if key not in state or state[key].shape != known[key].shape]
        wrong += [key for key in state if key not in known and not key.endswith("position_ids")]
        if wrong:
            raise SepMEError(
                f"{file.path}: its {what} is not that of SD 1.x, 2.x or XL ({len(wrong)} tensors are missing, left over or of "
                f"another shape, such as {wrong[0]}); this variant is not supported, or the file is damaged."
            )
        module.load_state_dict({key: state[key] for key in known}, assign=True)
    except SepMEError:
        raise
    except Exception as error:  # impossible widths make the constructors raise
        if out_of_memory(error):
            raise
        raise SepMEError(
            f"{file.path}: its {what} cannot be built ({type(error).__name__}: {first_line(error)}); it is not supported."
        ) from None
    for part in module.modules():  # what is not in a state dict still lies on the meta device
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                part.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)
    return module.requires_grad_(False).eval()
