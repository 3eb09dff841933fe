"""What other erasers changed: ``ΔW`` of to_k and to_v from LoRA files, and from whole or partial weights against a base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SepMEError, out_of_memory
from ..files import check_precision, refuse_pickle
from .names import diffusers_names

PREFIX = re.compile(r"^(?:lora_unet_|base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.)+")
DOWN = r"lora_down|lora_A|lora\.down|lora_linear_layer\.down"
UP = r"lora_up|lora_B|lora\.up|lora_linear_layer\.up"
FACTOR = re.compile(rf"^(.*?)(?:\.(?:({DOWN})|({UP}))(?:\.\w+)?\.weight|\.(alpha))$")
OLD = re.compile(r"\.processor\.(to_[kqv]|to_out)_lora\.(down|up)\.weight$")  # diffusers before 0.22
OTHER_KIND = re.compile(r"\.(?:hada_\w+|lokr_\w+|dora_scale|lora_magnitude_vector(?:\.\w+)*|oft_blocks|diff(?:_b)?)$")
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class Foreign:
    """What a file does to cross-attention.

    Attributes:
        kind: ``lora`` or ``weights``.
        changes: makes ``ΔW`` ``(d_out, d_in)`` float32, by projection name; only those that differ from 0.
        others: tensors of the file that are no to_k or to_v of cross-attention; a delta cannot hold what they do.
        alpha: whether a LoRA says its own scale; if not, 1 is taken.
    """

    kind: str
    changes: Mapping[str, Callable[[], Tensor]]
    others: int
    alpha: bool = True

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Projection names and their ``ΔW``, one at a time."""
        return ((name, make()) for name, make in self.changes.items())


def read_foreign(path: str | Path, base: Mapping[str, Tensor]) -> Foreign:
    """Read an eraser's file.

    Args:
        path: a LoRA (kohya's, diffusers' or PEFT's keys) or weights in LDM's or diffusers' names, whole or partial.
        base: K/V weights ``(d_out, d_in)`` by projection name of the model that it was made for.

    Raises:
        SepMEError: no safetensors, damaged, another kind of adapter, nothing of cross-attention in it, other shapes than the base's,
            NaN, or no change at all.
    """
    path = Path(path)
    refuse_pickle(path)
    tensors, metadata, others = _read(path, _aliases(base))
    for name, by_role in tensors.items():
        for tensor in by_role.values():
            if not tensor.float().isfinite().all():
                raise SepMEError(f"{path} holds NaN or infinite values at {name}; get it again.")
    if not tensors:
        raise SepMEError(f"{path} holds no to_k or to_v of this model's cross-attention; only what is there can be imported.")
    if any("weight" in by_role for by_role in tensors.values()):
        return _weights(path, tensors, base, others)
    return _lora(path, tensors, base, others, metadata)


def _aliases(base: Mapping[str, Tensor]) -> dict[str, str]:
    """Projection names by what others call them, dots written as underscores."""
    layers = {name.rsplit(".", 1)[0] for name in base}
    theirs = diffusers_names(layers)
    pairs = [(name, *name.rsplit(".", 1)) for name in base]
    both = [(name, f"{theirs[layer]}.{end}") for name, layer, end in pairs] + [(name, name) for name in base]
    return {alias.replace(".", "_"): name for name, alias in both}


def _read(path: Path, aliases: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], int]:
    """K/V tensors by projection name and role (``weight``, ``down``, ``up``, ``alpha``), metadata, and how many others there are."""
    found: dict[str, dict[str, Tensor]] = {}
    others = 0
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                module, role = _split(key)
                name = aliases.get(PREFIX.sub("", module).replace(".", "_"))
                if name is None:
                    others += 1
                    continue
                if role == "other":
                    raise SepMEError(f"{path} is a LoHa, LoKr, DoRA, OFT or full-difference adapter; only plain LoRA can be imported.")
                if role != "alpha":  # a number, in whatever type
                    check_precision(path, key, file.get_slice(key).get_dtype())
                found.setdefault(name, {})[role] = file.get_tensor(key)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, SepMEError) or out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:120]
        raise SepMEError(f"{path} is no safetensors file or is cut short ({reason}); get it again.") from None
    return found, metadata, others


def _split(key: str) -> tuple[str, str]:
    """Module and role of a tensor: down, up, alpha, ``other`` (of adapters that are no plain LoRA), or its last name."""
    key = OLD.sub(r".\1.lora.\2.weight", key)
    if match := FACTOR.match(key):
        return match[1], "down" if match[2] else "up" if match[3] else "alpha"
    if match := OTHER_KIND.search(key):
        return key[: match.start()], "other"
    module, _, end = key.rpartition(".")
    return module, end


def _weights(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor], others: int) -> Foreign:
    changes = {}
    for name, by_role in tensors.items():
        own, weight = by_role.get("weight"), base[name].cpu()
        if own is None or own.shape != weight.shape:
            shape = None if own is None else tuple(own.shape)
            raise SepMEError(f"{path}: {name} has shape {shape}, the base has {tuple(weight.shape)}; name the model it was made from.")
        if torch.equal(own, weight.to(own.dtype)):  # as coarse as the file, so that rounding is no change
            continue
        changes[name] = lambda own=own, weight=weight: own.float() - weight.to(own.dtype).float()
    if not changes:
        raise SepMEError(f"{path} has the same to_k and to_v as the base; it erases nothing there.")
    return Foreign("weights", changes, others)


def _lora(
    path: Path, tensors: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor], others: int, metadata: Mapping[str, str]
) -> Foreign:
    config = _config(path, metadata)
    changes = {}
    for name, by_role in tensors.items():
        if not {"down", "up"} <= set(by_role):
            raise SepMEError(f"{path}: {name} lacks one of its two factors; the file is damaged or no LoRA.")
        down, up = by_role["down"].flatten(1), by_role["up"].flatten(1)
        if (len(up), down.shape[1]) != base[name].shape or up.shape[1] != len(down):
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            raise SepMEError(f"{path}: {name} has factors {shapes}, the base {tuple(base[name].shape)}; the LoRA is for another model.")
        rank, alpha = len(down), by_role.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise SepMEError(f"{path}: the scale of {name} is {alpha.numel()} numbers instead of one; the file is damaged or no LoRA.")
        scale = _scale(config, rank) if alpha is None else float(alpha) / rank
        if not math.isfinite(scale):
            raise SepMEError(f"{path}: the scale of {name} is no number; the file is damaged.")
        if scale and down.any() and up.any():
            changes[name] = lambda up=up, down=down, scale=scale: scale * (up.float() @ down.float())
    if not changes:
        raise SepMEError(f"{path} changes neither to_k nor to_v; there is nothing to import.")
    return Foreign("lora", changes, others, bool(config) or all("alpha" in r for r in tensors.values()))


def _scale(config: Mapping[str, Any], rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    if not isinstance(alpha, (int, float)) or config.get("alpha_pattern"):
        raise SepMEError("This LoRA has a scale for every layer in its configuration; save it in kohya's layout first.")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration, from the metadata that diffusers writes or from PEFT's own file beside the weights; {} if there is none."""
    text, beside = metadata.get("lora_adapter_metadata"), path.with_name("adapter_config.json")
    try:
        if text is None and path.name == "adapter_model.safetensors" and beside.is_file() and beside.stat().st_size < MAX_CONFIG:
            text = beside.read_text(encoding="utf-8")
        data = json.loads(text) if text is not None else {}
        return {k.removeprefix("unet."): v for k, v in data.items() if "." not in k.removeprefix("unet.")}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise SepMEError(f"The LoRA configuration of {path} is not readable JSON; get it again.") from None
