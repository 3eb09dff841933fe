"""What others call the cross-attention layers: diffusers' and kohya's names, from the canonical (LDM) names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import SepMEError

_CANONICAL = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.(\d+)\.attn2")


def diffusers_names(layers: Iterable[str]) -> dict[str, str]:
    """diffusers' names of attn2 modules by canonical name; the inverse of :func:`sepme.model.layers.diffusers_to_ldm`.

    An LDM UNet counts its blocks through, with a downsampler behind every ``r`` input blocks and ``r + 1`` output blocks a level.
    Cross-attention stands behind all resnets of a level or none, so the longest run of input blocks that have it is ``r``.

    Raises:
        SepMEError: no UNet of Stable Diffusion has these layers.
    """
    layers = list(layers)
    found = {name: match for name in layers if (match := _CANONICAL.fullmatch(name))}
    inputs = {int(m[2]) for m in found.values() if m[1] == "input"}
    run = resnets = 0
    for index in range(1, max(inputs, default=0) + 1):
        run = run + 1 if index in inputs else 0
        resnets = max(resnets, run)
    if not resnets or len(found) < len(layers):
        raise SepMEError("These layers are not those of a Stable Diffusion UNet; other tools have no names for them.")
    return {name: _diffusers(match, resnets) for name, match in found.items()}


def _diffusers(match: re.Match[str], resnets: int) -> str:
    side, index, block = match[1], int(match[2] or 0), match[3]
    if side is None:
        stem = "mid_block.attentions.0"
    elif side == "input":
        stem = f"down_blocks.{(index - 1) // (resnets + 1)}.attentions.{(index - 1) % (resnets + 1)}"
    else:
        stem = f"up_blocks.{index // (resnets + 1)}.attentions.{index % (resnets + 1)}"
    return f"{stem}.transformer_blocks.{block}.attn2"


def kohya_names(projections: Iterable[str]) -> dict[str, str]:
    """kohya's names of ``to_k`` / ``to_v`` by projection name: ``lora_unet_down_blocks_0_…_attn2_to_k``.

    They are made of diffusers' names; kohya's loaders, AUTOMATIC1111, Forge, ComfyUI and diffusers all read these, SDXL's too.
    """
    split = {name: name.rsplit(".", 1) for name in projections}
    theirs = diffusers_names(dict.fromkeys(layer for layer, _ in split.values()))
    return {name: f"lora_unet_{theirs[layer]}_{end}".replace(".", "_") for name, (layer, end) in split.items()}
