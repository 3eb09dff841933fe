"""ComfyUI's UNets as denoiser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_sampling
import latent_preview
import torch
from torch import Tensor

from ...sepme import ddim
from ...sepme.errors import SepMEError
from ...sepme.protocols import AttentionLayer

_ATTENTION = re.compile(r"(?:(?:input|output)_blocks\.\d+\.1|middle_block\.1)\.transformer_blocks\.\d+\.attn2")
SIDES = {768: 64, 1024: 64, 2048: 128}  # latents of SD1.x, SD2.x and SDXL, by width of the context


def attention_layers(model: Any) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a loaded model (``patcher.model``) by canonical name.

    Raises:
        SepMEError: it is no UNet of Stable Diffusion.
    """
    layers = {name: module for name, module in model.diffusion_model.named_modules() if _ATTENTION.fullmatch(name)}
    if not layers:
        raise SepMEError(f"{type(model).__name__} is no SD1.x, SD2.x or SDXL model; SepME edits the text layers of those only.")
    return layers


class UNetDenoiser:
    """A loaded model as :class:`~sepme.protocols.Denoiser`: x_t as in the papers, ``√ᾱ x_0 + √(1−ᾱ) ε``; always ε.

    Args:
        patcher: a MODEL; it must be loaded (:func:`~.jobs.trainable`) when it predicts.
        size: pixels of an image's side; the model's own if 0.

    Raises:
        SepMEError: no UNet of Stable Diffusion, or it predicts neither ε nor v, or a size that it cannot draw.
    """

    def __init__(self, patcher: Any, size: int = 0) -> None:
        self.model = patcher.model
        self._layers = attention_layers(self.model)
        sampling = patcher.get_model_object("model_sampling")
        known = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and isinstance(sampling, comfy.model_sampling.EPS)
        if not known or isinstance(sampling, (comfy.model_sampling.EDM, comfy.model_sampling.X0)):
            raise SepMEError("This model predicts neither noise nor v at discrete timesteps; use a plain SD1.x, SD2.x or SDXL.")
        self.predicts_v = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        with torch.inference_mode(False):  # tensors that may take part in a graph
            self.alphas = 1 / (sampling.sigmas.detach().float().clone().square() + 1)
        width = next(iter(self._layers.values())).to_k.in_features
        unet = self.model.model_config.unet_config
        self.side = size // 8 if size else SIDES.get(width, unet.get("image_size", 64))
        levels = 2 ** (len(unet["channel_mult"]) - 1)
        if self.side % levels or self.side < levels:
            raise SepMEError(f"Images of this model have sides that are multiples of {8 * levels} pixels, not {size}.")

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.manual_cast_dtype or self.model.get_dtype()
        return dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def timesteps(self) -> int:
        return len(self.alphas)

    @property
    def latents(self) -> tuple[int, ...]:
        """Shape of one image's latents."""
        return (self.model.latent_format.latent_channels, self.side, self.side)

    def preview(self) -> Callable[[Tensor], Any] | None:
        """What makes a quick picture (PIL) of latents, as the sampler's previews are made; None where there is no such thing."""
        own: Callable[[Tensor], Any] | None = getattr(self.model.latent_format, "picture", None)
        if own is not None:
            return own
        found = latent_preview.get_previewer(self.device, self.model.latent_format)
        return None if found is None else lambda latents: found.decode_latent_to_preview(latents)

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return dict(self._layers)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        x, t = x_t.to(self.device, self.dtype), t.to(self.device)
        more = {}
        if extra is not None:
            pixels = 8 * self.side
            label = self.model.encode_adm(pooled_output=extra, width=pixels, height=pixels, device=self.device)
            more["y"] = label.to(self.device, self.dtype)
        out = self.model.diffusion_model(x, t, context=context.to(self.device, self.dtype), transformer_options={}, **more)
        if not self.predicts_v:
            return out
        alpha = self._alpha(t, x)
        return (alpha.sqrt() * out.float() + (1 - alpha).sqrt() * x.float()).to(out.dtype)

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self._alpha(t, x_0)
        return (alpha.sqrt() * x_0.float() + (1 - alpha).sqrt() * noise.float()).to(x_0.dtype)

    def _alpha(self, t: Tensor, like: Tensor) -> Tensor:
        return self.alphas.to(like.device)[t.to(like.device)].reshape(-1, *[1] * (like.dim() - 1))

    def _runs(
        self, context: Tensor, empty: Tensor, generator: torch.Generator, extra: Any, steps: int, guidance: float
    ) -> Iterator[Tensor]:
        seeds = torch.randint(1 << 31, (len(context),), generator=generator).tolist()
        start = torch.stack([torch.randn(self.latents, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return ddim.runs(self, self.alphas, start.to(self.device, self.dtype), context, empty, extra, steps, guidance)

    def trajectory(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        points = []
        for x in self._runs(context, empty, generator, extra, 25, 3.0):
            points.append(x)
            if on_step is not None:
                on_step()
        return torch.stack(points[:-1]), ddim.timesteps(25, self.timesteps).to(self.device)

    def drawn(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        for x in self._runs(context, empty, generator, extra, 50, 7.5):  # noqa: B007
            if on_step is not None:
                on_step()
        return x
