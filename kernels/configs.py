"""Tile sizes as data: ``configs.json`` holds them for each family of GPUs, precision and number of rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

NVIDIA = {(8, 0): "sm80", (8, 6): "sm86", (8, 7): "sm86", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}


@dataclass(frozen=True)
class Config:
    """A tile is ``block_m`` rows by ``block_n`` columns; it walks d_in by ``block_k`` and R by ``block_r``.

    Attributes:
        max_rows: M (rows times tokens) up to which it is taken; 0 for any.
        per_processor: programs on each multiprocessor.
    """

    max_rows: int
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    warps: int
    stages: int
    per_processor: int


@lru_cache
def load() -> dict[str, dict[str, tuple[Config, ...]]]:
    """Configurations by family and kind ('half' or 'float32'), narrowest ``max_rows`` first."""
    data = json.loads(Path(__file__).with_name("configs.json").read_text(encoding="utf-8"))
    return {name: {kind: tuple(Config(**c) for c in found) for kind, found in kinds.items()} for name, kinds in data.items()}


def choose(name: str, dtype: torch.dtype, rows: int) -> Config:
    """The configuration for M ``rows``; that of 'default' for a family that the table lacks."""
    table = load()
    found = table.get(name, table["default"])["float32" if dtype == torch.float32 else "half"]
    return next(c for c in found if c.max_rows == 0 or rows <= c.max_rows)


@lru_cache
def family(device: torch.device) -> str:
    """Name of the GPU family: sm80 to sm120, gfx942, gfx1100, ...; 'default' for no GPU (the interpreter) and for unknown ones."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "gfx1100" if architecture.startswith("gfx1") else architecture
    capability = torch.cuda.get_device_capability(device)
    return "sm120" if capability[0] == 12 else NVIDIA.get(capability, "default")
