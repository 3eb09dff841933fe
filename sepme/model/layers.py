"""Names of cross-attention layers: canonical (LDM) names <-> diffusers names, architecture and fingerprint of a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .protocols import AttentionLayer

PROJECTIONS = ("to_k", "to_v")
_LDM = re.compile(r"(?:(?:input|output)_blocks\.\d+\.1|middle_block\.1)\.transformer_blocks\.\d+\.attn2")


def diffusers_to_ldm(down_blocks: Sequence[Sequence[int]], middle: int, up_blocks: Sequence[Sequence[int]]) -> dict[str, str]:
    """Map diffusers names of attn2 modules to canonical LDM names, in the order of the forward pass.

    Args:
        down_blocks, up_blocks: for every block, the number of transformer blocks behind each of its resnets (0: none).
        middle: number of transformer blocks in the middle block.
    """
    names: dict[str, str] = {}

    def add(theirs: str, ldm: str, depth: int) -> None:
        for i in range(depth):
            names[f"{theirs}.transformer_blocks.{i}.attn2"] = f"{ldm}.transformer_blocks.{i}.attn2"

    index = 1
    for b, depths in enumerate(down_blocks):
        for j, depth in enumerate(depths):
            add(f"down_blocks.{b}.attentions.{j}", f"input_blocks.{index}.1", depth)
            index += 1
        index += 1  # the downsampler's own block
    add("mid_block.attentions.0", "middle_block.1", middle)
    index = 0
    for b, depths in enumerate(up_blocks):
        for j, depth in enumerate(depths):
            add(f"up_blocks.{b}.attentions.{j}", f"output_blocks.{index}.1", depth)
            index += 1
    return names


def unet_layers(unet: Any) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a diffusers ``UNet2DConditionModel`` by canonical name."""

    def depths(block: Any) -> list[int]:
        attentions = list(getattr(block, "attentions", []))
        return [len(a.transformer_blocks) for a in attentions] or [0] * len(block.resnets)

    middle = getattr(unet.mid_block, "attentions", None)
    names = diffusers_to_ldm(
        [depths(b) for b in unet.down_blocks],
        len(middle[0].transformer_blocks) if middle else 0,
        [depths(b) for b in unet.up_blocks],
    )
    return {ldm: unet.get_submodule(name) for name, ldm in names.items()}


_names: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()  # a walk over all modules would show at every toggle


def ldm_layers(unet: nn.Module) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a UNet whose own names are the canonical ones, in the order of the forward pass.

    It may be compiled, as a whole or in parts: ``torch.compile`` puts a module of its own around each.
    """
    if unet not in _names:
        plain = {path: path.replace("_orig_mod.", "").removesuffix("._orig_mod") for path, _ in unet.named_modules()}
        _names[unet] = {name: path for path, name in plain.items() if _LDM.fullmatch(name)}
    return {name: cast(AttentionLayer, unet.get_submodule(path)) for name, path in _names[unet].items()}


def projections(layers: Mapping[str, AttentionLayer]) -> dict[str, nn.Module]:
    """The ``to_k`` and ``to_v`` modules by ``<layer>.to_k`` / ``<layer>.to_v``."""
    return {f"{name}.{p}": getattr(layer, p) for name, layer in layers.items() for p in PROJECTIONS}


def weight_of(module: nn.Module) -> Tensor:
    """The weight ``(d_out, d_in)`` of a projection."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def shapes(layers: Mapping[str, AttentionLayer]) -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` by projection name."""
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights(layers).items()}


def weights(layers: Mapping[str, AttentionLayer]) -> dict[str, Tensor]:
    """K/V weights ``(d_out, d_in)`` by projection name, detached."""
    return {name: weight_of(module).detach() for name, module in projections(layers).items()}


def architecture(kv_shapes: Mapping[str, tuple[int, int]]) -> str:
    """Name of the architecture with these K/V shapes: sd15, sd21, sdxl, or one made of d_in and the layer list."""
    d_ins = sorted({s[1] for s in kv_shapes.values()})
    known = {(768, 32): "sd15", (1024, 32): "sd21", (2048, 140): "sdxl"}
    if len(d_ins) == 1 and (d_ins[0], len(kv_shapes)) in known:
        return known[d_ins[0], len(kv_shapes)]
    digest = hashlib.sha256(repr(sorted((n, tuple(s)) for n, s in kv_shapes.items())).encode()).hexdigest()[:8]
    return f"unet-{'+'.join(map(str, d_ins))}x{len(kv_shapes) // 2}-{digest}"


def kv_fingerprint(layers: Mapping[str, AttentionLayer]) -> str:
    """Hash of a checkpoint's K/V weights (rounded to float16, so that precision on disk does not matter)."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights(layers).items()):
        digest.update(name.encode())
        digest.update(weight.to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def leave_inference_mode(model: nn.Module) -> None:
    """Parameters and buffers that were made under inference mode cannot take part in a graph: put equal ones in their place, one by one."""
    with torch.inference_mode(False):
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in stores:
                for name, value in held.items():
                    if value is not None and value.is_inference():
                        plain = value.detach().clone()
                        held[name] = nn.Parameter(plain, value.requires_grad) if isinstance(value, nn.Parameter) else plain
