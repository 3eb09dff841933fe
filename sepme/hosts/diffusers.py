"""diffusers as a host: Stable Diffusion 1.x, 2.x and XL, and models like them of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..apply.composition import Composition
from ..apply.kv_cache import room
from ..apply.projector import KVProjector
from ..apply.toggles import Toggles, merge, parse_tags, strengths
from ..checks import SEEDS, check_finite, check_number
from ..delta.thumbnail import bearable
from ..errors import SepMEError
from ..images import as_picture, grid
from ..model.layers import text_layers
from ..model.protocols import AttentionLayer, Encoding
from ..model.schedule import GLANCE, TRAJECTORY, Schedule, ScheduledDenoiser
from ..model.words import WordTable
from .loading import DEMO, PREDICTIONS, LoadOptions, load_pipeline
from .pipeline import PipelineEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..delta.concept_delta import ConceptDelta
    from ..delta.thumbnail import Draw

__all__ = ["DEMO", "DiffusersHost", "LoadOptions", "thumbnails"]


class DiffusersHost(ScheduledDenoiser):
    """A pipeline as text encoder and denoiser; its parameters are frozen. ``size``: pixels of an image's side, the model's own if None;
    ``cache``: folder where encodings of the shipped prompts are kept, if anywhere."""

    def __init__(self, pipe: Any, size: int | None = None, cache: Path | None = None) -> None:
        self.prediction = pipe.scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise SepMEError(f"This model predicts {self.prediction}; only {' and '.join(PREDICTIONS)} are supported.")
        self.pipe, self.unet = pipe, pipe.unet
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        pipe.scheduler = self.scheduler
        pipe.set_progress_bar_config(disable=True)
        self._reader = PipelineEncoder(pipe, cache)
        self.encoders, self.name = self._reader.encoders, self._reader.name
        for part in (pipe.unet, pipe.vae, *(encoder for _, encoder in self.encoders)):
            part.requires_grad_(False).eval()
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
            pipe.vae.float()  # SDXL's overflows in half precision
        self.side = self.unet.config.sample_size if size is None else size // pipe.vae_scale_factor
        steps = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if size is not None and (size < 1 or size % (steps * pipe.vae_scale_factor)):
            raise SepMEError(f"Images of this model have sides that are multiples of {steps * pipe.vae_scale_factor} pixels, not {size}.")
        self._layers = text_layers(pipe.unet)

    @staticmethod
    def load(model: str, dtype: torch.dtype = torch.float32, options: LoadOptions | None = None) -> DiffusersHost:
        """Load ``demo``, a diffusers folder or a single-file checkpoint (safetensors only, nothing is downloaded).

        Args:
            dtype: of the weights, where ``options`` are not given.

        Raises:
            SepMEError: see :func:`load_pipeline`.
        """
        options = options or LoadOptions(dtype=dtype)
        return DiffusersHost(load_pipeline(model, options), options.size, options.cache)

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The scheduler's noise levels."""
        return Schedule.diffusion(self.scheduler.alphas_cumprod, self.prediction)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.unet.config.in_channels, self.side, self.side)

    @property
    def device(self) -> torch.device:
        own = self.unet.device  # meta where accelerate brings weights in for every forward pass
        return self.pipe._execution_device if own.type == "meta" else own

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def words(self) -> WordTable:
        """See :func:`~sepme.model.words.word_table`."""
        return self._reader.words()

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Encoding:
        """See :class:`~.pipeline.PipelineEncoder`."""
        return self._reader.encode(prompts, grad)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """What the UNet itself returns, ε or v. SDXL's size conditioning: drawn and wanted at this size, nothing cropped."""
        added = None
        if self.unet.config.get("addition_embed_type") == "text_time":
            if extra is None:
                raise SepMEError("This model reads a pooled text vector beside the context; pass it as 'extra'.")
            side = self.side * self.pipe.vae_scale_factor
            ids = torch.tensor([side, side, 0, 0, side, side], device=x.device, dtype=context.dtype).expand(len(x), -1)
            added = {"text_embeds": extra, "time_ids": ids}
        return self.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return dict(self._layers)

    @property
    def image_size(self) -> int:
        return int(self.side * self.pipe.vae_scale_factor)

    def encode_images(self, images: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
        latents = []
        for part in images.split(4):
            with torch.no_grad():
                encoded = self.pipe.vae.encode(part.to(self.device, self.pipe.vae.dtype))
            x_0 = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            latents.append((x_0 * self.pipe.vae.config.scaling_factor).to(self.unet.dtype))
            if on_step is not None:
                on_step()
        return check_finite(torch.cat(latents), "VAE", "an encoded picture")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(n, 3, height, width)`` float32 in [-1, 1] of latents ``(n, 4, h, w)``."""
        vae = self.pipe.vae
        scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
        return check_finite(vae.decode(scaled).sample.float(), "VAE", "the decoded picture").clamp(-1, 1)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        composition: Composition | None = None,
        toggles: Toggles | None = None,
        *,
        negative: str = "",
        steps: int = TRAJECTORY.steps,
        guidance: float = TRAJECTORY.guidance,
        gate: bool = True,
        keep: bool = True,
        backend: str = "auto",
        latents_only: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample one image per prompt and seed, each prompt with its own toggles (its tags beat ``toggles``).

        ``gate``, ``keep`` and ``backend`` are :class:`KVProjector`'s.

        Returns:
            images ``(n, 3, height, width)`` float32 in [-1, 1], or latents ``(n, 4, h, w)``.
        """
        check_number("steps", steps, 1, self.timesteps, whole=True)
        check_number("guidance", guidance, -1e3, 1e3)
        for seed in seeds:
            check_number("seed", seed, *SEEDS, whole=True)
        texts, tags = zip(*(parse_tags(p) for p in prompts), strict=True)
        negative_text, negative_tags = parse_tags(negative)
        cond = self.encode(texts)
        uncond = self.encode([negative_text]).rows([0] * len(prompts))
        check_finite(cond.context, "text encoder", "the prompt's encoding")
        check_finite(uncond.context, "text encoder", "the negative prompt's encoding")
        plain = torch.cat([uncond.context, cond.context])
        pooled = None if uncond.pooled is None or cond.pooled is None else torch.cat([uncond.pooled, cond.pooled])
        sample = partial(self._sample, self.latents(seeds), steps, guidance, on_step)
        with torch.no_grad():
            if composition is None or not composition.deltas:
                latents = sample(plain, pooled)
            else:
                rows = [merge(toggles or {}, t) for t in tags]
                table = strengths([merge(toggles or {}, negative_tags)] * len(rows) + rows, composition.deltas)
                if pooled is not None:
                    pooled = composition.replace_pooled(pooled, plain, table, gate)
                edited = composition.edit_context(plain, table, gate)
                if guidance <= 1:  # the pipeline leaves the negative prompt out
                    table, plain = table[len(rows) :], plain[len(rows) :]
                projector = KVProjector(self._layers, composition, gate, keep, room(self.unet), backend)
                with projector.attached(table, plain) if composition.columns else nullcontext():
                    latents = sample(edited, pooled)
            return latents if latents_only else self.decode(latents)

    def _sample(
        self, latents: Tensor, steps: int, guidance: float, on_step: Callable[[int], None] | None, context: Tensor, pooled: Tensor | None
    ) -> Tensor:
        """Latents that the pipeline makes of noise, given negative and then positive prompts' contexts and pooled vectors."""

        def step_end(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            check_finite(kwargs["latents"], "UNet", f"step {index + 1} of {steps}")
            if on_step is not None:
                on_step(index)
            return kwargs

        embeddings = dict(zip(("negative_prompt_embeds", "prompt_embeds"), context.chunk(2), strict=True))
        if pooled is not None:
            embeddings |= zip(("negative_pooled_prompt_embeds", "pooled_prompt_embeds"), pooled.chunk(2), strict=True)
        side = self.image_size
        return self.pipe(
            latents=latents, height=side, width=side, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
            callback_on_step_end=step_end, **embeddings,
        ).images  # fmt: skip


def thumbnails(host: Any, check: Callable[[], None] = lambda: None) -> Draw | None:
    """What draws small pictures for delta files; None where the host is no whole model, or would draw for minutes.

    Args:
        check: called after every denoising step; it may raise :class:`~sepme.errors.Interrupted`.
    """
    if not isinstance(host, DiffusersHost) or not bearable(host.device.type, sum(p.numel() for p in host.unet.parameters())):
        return None

    def draw(prompt: str, deltas: Sequence[ConceptDelta]) -> Image:
        made = host.generate(
            [prompt], [0], Composition(tuple(deltas)), steps=GLANCE.steps, guidance=GLANCE.guidance, on_step=lambda step: check()
        )
        return as_picture(grid(made))

    return draw
