"""UNets of Stable Diffusion, with cross-attention behind resnets; also those of unpublished sizes.

Sites have the names of single files, which count all blocks through. diffusers counts levels and resnets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ...errors import SepMEError
from .family import EMBEDDED, POOLED, Family, Projection

ENDS = ("to_k", "to_v")
PROJECTIONS = tuple(
    Projection(f"{block}.1.transformer_blocks.*.attn2.{end}")
    for block in ("input_blocks.*", "middle_block", "output_blocks.*")
    for end in ENDS
)
_LAYER = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.(\d+)\.attn2")
_UNIT = re.compile(r"((down|up)_blocks\.(\d+)|mid_block)\.(?:resnets|attentions)\.(\d+)\.(?:transformer_blocks\.(\d+)\.)?.*")
Layout = tuple[list[list[int]], int, list[list[int]]]


def label_embedding() -> tuple[Projection, ...]:
    """Layers that read the pooled vector, beside numbers that say the size of the picture."""
    return (
        Projection("label_emb.0.0", diffusers="add_embedding.linear_1", group=POOLED, bias=True),
        Projection("label_emb.0.2", diffusers="add_embedding.linear_2", group=EMBEDDED, bias=True),
    )


class UNet(Family):
    """A family in which diffusers numbers the layers in another way."""

    def to_diffusers(self, sites: Collection[str]) -> dict[str, str]:
        """Names of the modules in diffusers, by site.

        A UNet has a downsampler behind every ``r`` input blocks, and ``r + 1`` output blocks per level. Cross-attention stands behind
        all resnets of a level or none, so the longest run of input blocks that have it is ``r``.

        Raises:
            SepMEError: no UNet of Stable Diffusion has these sites.
        """
        split = {site: site.rpartition(".") for site in sites}
        found = {layer: match for layer, _, _ in split.values() if (match := _LAYER.fullmatch(layer))}
        inputs = {int(m[2]) for m in found.values() if m[1] == "input"}
        run = resnets = 0
        for index in range(1, max(inputs, default=0) + 1):
            run = run + 1 if index in inputs else 0
            resnets = max(resnets, run)
        other = {p.site: p.diffusers for p in self.projections if p.diffusers}
        if not resnets or not all(self.has(site) or site in other for site in sites):
            raise SepMEError("These layers are not those of a Stable Diffusion UNet; other tools have no names for them.")
        return {s: other.get(s) or f"{_diffusers(found[layer], resnets)}.{end}" for s, (layer, _, end) in split.items()}

    def from_diffusers(self, names: Collection[str]) -> dict[str, str]:
        """Those of ``names`` that are diffusers' names of sites, by site; the names say how many resnets and layers each level has."""
        layers = diffusers_to_ldm(*_layout(names))
        present = set(names)
        found = {f"{ldm}.{end}": f"{theirs}.{end}" for theirs, ldm in layers.items() for end in ENDS}
        found |= {p.site: p.diffusers for p in self.projections if p.diffusers}
        return {site: name for site, name in found.items() if name in present}


def _diffusers(match: re.Match[str], resnets: int) -> str:
    side, index, block = match[1], int(match[2] or 0), match[3]
    if side is None:
        stem = "mid_block.attentions.0"
    elif side == "input":
        stem = f"down_blocks.{(index - 1) // (resnets + 1)}.attentions.{(index - 1) % (resnets + 1)}"
    else:
        stem = f"up_blocks.{index // (resnets + 1)}.attentions.{index % (resnets + 1)}"
    return f"{stem}.transformer_blocks.{block}.attn2"


def _layout(names: Collection[str]) -> Layout:
    """Arguments of :func:`diffusers_to_ldm`, from the names of all modules."""
    units: dict[str, int] = {}
    depths: dict[str, int] = {}
    for match in filter(None, map(_UNIT.fullmatch, names)):
        block, unit = match[1], int(match[4])
        units[block] = max(units.get(block, 0), unit + 1)
        if match[5]:
            depths[f"{block}.{unit}"] = max(depths.get(f"{block}.{unit}", 0), int(match[5]) + 1)

    def side(name: str) -> list[list[int]]:
        blocks = (f"{name}_blocks.{i}" for i in range(len(units)))
        return [[depths.get(f"{block}.{unit}", 0) for unit in range(units.get(block, 0))] for block in blocks]

    return side("down"), depths.get("mid_block.0", 0), side("up")


def diffusers_to_ldm(down_blocks: Sequence[Sequence[int]], middle: int, up_blocks: Sequence[Sequence[int]]) -> dict[str, str]:
    """Names of attn2 modules in single files by their names in diffusers, in the order of the forward pass.

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


FAMILY = UNet("unet", PROJECTIONS)
