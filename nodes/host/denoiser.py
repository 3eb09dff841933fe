"""ComfyUI's models as denoiser: what all have in common, and the UNets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import comfy.model_sampling
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ...sepme.errors import SepMEError
from ...sepme.model.families import labels
from ...sepme.model.layers import Layers, TextBlocks, latent_side, text_layers
from ...sepme.model.protocols import AttentionLayer
from ...sepme.model.schedule import Schedule, ScheduledDenoiser
from .jobs import trainable


def attention_layers(model: Any) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a loaded model (``patcher.model``) by canonical name.

    Raises:
        SepMEError: it is no UNet of Stable Diffusion.
    """
    layers = text_layers(model.diffusion_model)
    if not layers:
        raise SepMEError(
            f"{type(model).__name__} is no {labels()} model, whose layers read text alone; choose the edit context in SepME Train, which "
            "every model with a text encoder can use."
        )
    return layers


def text_blocks(patcher: Any) -> TextBlocks | None:
    """What in a MODEL reads text alone, if it is no UNet."""
    return TextBlocks.of(patcher.model.diffusion_model)


def changeable_layers(model: Any) -> Layers:
    """What deltas of single layers can change in a loaded model: a UNet's cross-attention, or what in other models reads text alone.

    Raises:
        SepMEError: text and picture are mixed.
    """
    return TextBlocks.of(model.diffusion_model) or attention_layers(model)


class HostDenoiser(ScheduledDenoiser):
    """A MODEL as :class:`~sepme.model.protocols.Denoiser`; it must be loaded (:meth:`trainable`) when it predicts."""

    def __init__(self, patcher: Any) -> None:
        self._patcher, self.model = patcher, patcher.model

    @property
    @abstractmethod
    def pixels(self) -> int:
        """Of an image's side."""

    def trainable(self, rows: int) -> AbstractContextManager[Any]:
        """See :func:`~.jobs.trainable`, for batches of so many rows."""
        return trainable(self._patcher, (rows, *self.latent_shape))

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        dtype: torch.dtype = self.model.manual_cast_dtype or self.model.get_dtype()
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.model.device)

    def preview(self) -> Callable[[Tensor], Any] | None:
        """What makes a quick picture (PIL) of latents, as the sampler's previews are made; None where there is no such thing."""
        own: Callable[[Tensor], Any] | None = getattr(self.model.latent_format, "picture", None)
        if own is not None:
            return own
        found = latent_preview.get_previewer(self.device, self.model.latent_format)
        return None if found is None else lambda latents: found.decode_latent_to_preview(latents)

    def picture(self, latents: Tensor) -> Any:
        """A quick picture (PIL) of sampled latents ``(1, c, h, w)`` whatever previews are set to: colours by latent channel.

        Raises:
            SepMEError: nothing is known of the colours.
        """
        format = self.model.latent_format
        latents = format.process_in(latents).float().cpu()
        own: Callable[[Tensor], Any] | None = getattr(format, "picture", None)
        if own is not None:
            return own(latents)
        if format.latent_rgb_factors is None:
            raise SepMEError("no colours are known of this model's latents")
        bias = torch.tensor(getattr(format, "latent_rgb_factors_bias", None) or [0.0, 0.0, 0.0])
        colours = latents[0].movedim(0, -1) @ torch.tensor(format.latent_rgb_factors) + bias
        return Image.fromarray(((colours + 1) / 2).clamp(0, 1).mul(255).byte().numpy())


class UNetDenoiser(HostDenoiser):
    """A UNet of Stable Diffusion.

    Args:
        patcher: a MODEL.
        size: pixels of an image's side; the model's own if 0.

    Raises:
        SepMEError: no UNet of Stable Diffusion, or it predicts neither ε nor v, or a size that it cannot draw.
    """

    def __init__(self, patcher: Any, size: int = 0) -> None:
        super().__init__(patcher)
        self._layers = attention_layers(self.model)
        sampling = patcher.get_model_object("model_sampling")
        known = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and isinstance(sampling, comfy.model_sampling.EPS)
        if not known or isinstance(sampling, (comfy.model_sampling.EDM, comfy.model_sampling.X0)):
            raise SepMEError(f"This model predicts neither noise nor v at discrete timesteps; use a plain {labels()}.")
        predicts_v = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        with torch.inference_mode(False):  # tensors that may take part in a graph
            alphas = 1 / (sampling.sigmas.detach().float().clone().square() + 1)
            self.schedule = Schedule.diffusion(alphas, "v_prediction" if predicts_v else "epsilon")
        unet = self.model.model_config.unet_config
        self.side = size // 8 if size else latent_side(self._layers) or unet.get("image_size", 64)
        levels = 2 ** (len(unet["channel_mult"]) - 1)
        if self.side % levels or self.side < levels:
            raise SepMEError(f"Images of this model have sides that are multiples of {8 * levels} pixels, not {size}.")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.model.latent_format.latent_channels, self.side, self.side)

    @property
    def pixels(self) -> int:
        return int(8 * self.side)

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return dict(self._layers)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        more = {}
        if extra is not None:
            label = self.model.encode_adm(pooled_output=extra, width=self.pixels, height=self.pixels, device=self.device)
            more["y"] = label.to(self.device, self.dtype)
        out: Tensor = self.model.diffusion_model(x, t, context=context, transformer_options={}, **more)
        return out
