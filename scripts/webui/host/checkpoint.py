"""The loaded checkpoint's UNet, wherever a host has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ....sepme.errors import SepMEError
from ....sepme.model.layers import architecture, ldm_layers, shapes
from ....sepme.model.protocols import AttentionLayer

CHUNK = 77  # tokens of a prompt's chunk


def is_forge(model: Any) -> bool:
    return getattr(model, "forge_objects", None) is not None


def unet_of(model: Any) -> nn.Module:
    """The diffusion model of a loaded checkpoint.

    Raises:
        SepMEError: nothing is loaded, or no Stable Diffusion UNet.
    """
    owner = model.forge_objects.unet.model if is_forge(model) else getattr(model, "model", None)
    unet = getattr(owner, "diffusion_model", None)
    if not isinstance(unet, nn.Module):
        raise SepMEError("No checkpoint is loaded; choose one at the top of the page first.")
    return unet


def attention_layers(model: Any) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a loaded checkpoint by canonical name.

    Raises:
        SepMEError: it has none that a delta could be for.
    """
    layers = ldm_layers(unet_of(model))
    if not layers:
        raise SepMEError("The loaded checkpoint is no SD1.x, SD2.x or SDXL; SepME edits the text layers of those only.")
    return layers


def architecture_of(model: Any) -> str:
    return architecture(shapes(attention_layers(model)))


def crossattn(cond: Any) -> Any:
    """The context of what the hosts call a cond: itself, or of SDXL a mapping."""
    return cond["crossattn"] if isinstance(cond, Mapping) else cond


def load_forge(unet: Any, x: Tensor) -> None:
    """Put a Forge's UNet and its patches on the device, with room for latents like these."""
    from modules.sd_samplers_kdiffusion import sampling_prepare

    sampling_prepare(unet, x=x)
