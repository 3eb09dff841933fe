"""The loaded checkpoint's UNet, wherever a host has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules import sd_models, shared
from torch import Tensor, nn

from ....sepme.delta.concept_delta import ConceptDelta
from ....sepme.delta.verify import check_named_encoder
from ....sepme.errors import SepMEError
from ....sepme.model.families import encoder_of, labels
from ....sepme.model.layers import context_architectures, fitting, shapes, text_layers
from ....sepme.model.protocols import AttentionLayer

CHUNK = 77  # tokens of a prompt's chunk
NO_FILE = "There is no checkpoint; put one into models/Stable-diffusion and choose it at the top of the page."


def is_forge(model: Any) -> bool:
    """Whether a loaded checkpoint belongs to a Forge, whose models are ComfyUI-like objects."""
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


def chosen_model() -> Any:
    """The checkpoint chosen at the top of the page; Forge loads it only when a picture is asked for.

    Raises:
        SepMEError: there is none.
    """
    if not sd_models.checkpoints_list:
        raise SepMEError(NO_FILE)
    if hasattr(sd_models, "forge_model_reload"):
        sd_models.forge_model_reload()
    return shared.sd_model


def checkpoint_file() -> Path:
    """The file of :func:`chosen_model`.

    Raises:
        SepMEError: see there.
    """
    return Path(chosen_model().sd_checkpoint_info.filename)


def missing() -> str:
    """What is missing for deltas, in a sentence, as far as that is known before the checkpoint is loaded."""
    if not sd_models.checkpoints_list:
        return NO_FILE
    model = sd_models.model_data.sd_model  # the host's own property would load it
    try:
        if getattr(model, "sd_checkpoint_info", None) is not None:
            architectures_of(model)
    except SepMEError as error:
        return str(error)
    return ""


def attention_layers(model: Any) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a loaded checkpoint by canonical name.

    Raises:
        SepMEError: it has none that a delta could be for.
    """
    layers = text_layers(unet_of(model))
    if not layers:
        raise SepMEError(
            f"The loaded checkpoint is no {labels()}; deltas are made of those only here. Make one with sepme train or in ComfyUI; "
            "files that edit the context work here too."
        )
    return layers


def architectures_of(model: Any) -> tuple[str, ...]:
    """Architectures of the deltas that fit a loaded checkpoint, its own first; of other models than UNets those that edit the context.

    Raises:
        SepMEError: it has none that a delta could be for.
    """
    unet = unet_of(model)
    return (
        context_architectures(unet) if not text_layers(unet) and context_architectures(unet) else fitting(shapes(attention_layers(model)))
    )


def check_contexts(model: Any, deltas: Sequence[ConceptDelta]) -> None:
    """Raise :class:`SepMEError` unless a loaded checkpoint reads the contexts that these deltas edit."""
    unet = unet_of(model)
    if text_layers(unet):
        for delta in deltas:
            delta.check_fits(shapes(attention_layers(model)))
        return
    known = architectures_of(model)
    for delta in deltas:
        if delta.architecture not in known:
            raise SepMEError(
                f"The delta of {delta.concept.name!r} is for {delta.architecture}, and this checkpoint reads {' or '.join(known)}; train "
                "the concept with its text encoder."
            )
    check_named_encoder(deltas, encoder_of({name: tuple(weight.shape) for name, weight in unet.named_parameters()}))


class ClipSkip:
    """How many of CLIP's last layers the host skips for this checkpoint, beyond what the checkpoint itself is made for.

    Automatic1111 has the setting for SD1, and for SDXL where another setting asks for it; Forge's engines have a least number of their own.
    """

    def __init__(self, model: Any) -> None:
        wanted = int(getattr(shared.opts, "CLIP_stop_at_last_layers", 1))
        if engines := _engines(model):
            self.clip_skip = max(max(wanted, least) - least for least in (int(e.minimal_clip_skip) for e in engines))
        elif getattr(model, "is_sdxl", False):
            self.clip_skip = wanted - 2 if getattr(shared.opts, "sdxl_clip_l_skip", False) is True else 0
        else:
            self.clip_skip = 0 if getattr(model, "is_sd2", False) else wanted - 1


def use_clip_skip(model: Any) -> None:
    """Forge tells its engines of the setting only when it encodes prompts for a picture."""
    if hasattr(model, "set_clip_skip"):
        model.set_clip_skip(int(getattr(shared.opts, "CLIP_stop_at_last_layers", 1)))


def _engines(model: Any) -> list[Any]:
    """Forge's text engines that can skip layers."""
    found = (getattr(model, f"text_processing_engine{name}", None) for name in ("", "_l", "_g"))
    return [engine for engine in found if hasattr(engine, "minimal_clip_skip")]


def crossattn(cond: Any) -> Any:
    """The context of what the hosts call a cond: itself, or of SDXL a mapping."""
    return cond["crossattn"] if isinstance(cond, Mapping) else cond


def load_forge(unet: Any, x: Tensor) -> None:
    """Put a Forge's UNet and its patches on the device, with room for latents like these."""
    from modules.sd_samplers_kdiffusion import sampling_prepare

    sampling_prepare(unet, x=x)
