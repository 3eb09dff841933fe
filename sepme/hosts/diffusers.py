"""diffusers as a host: Stable Diffusion 1.x-like pipelines of any size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from ..composition import Composition
from ..errors import SepMEError, out_of_memory
from ..layers import unet_layers
from ..protocols import AttentionLayer, Encoding
from ..runtime import KVProjector
from ..toggles import Toggles, merge, parse_tags, strengths

DEMO = Path(__file__).parents[1] / "demo" / "model"


class DiffusersHost:
    """A pipeline as text encoder and denoiser; its parameters are frozen."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise SepMEError(f"This model predicts {pipe.scheduler.config.prediction_type}, only epsilon is supported so far.")
        self.pipe, self.unet = pipe, pipe.unet
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = self.scheduler
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.unet, pipe.text_encoder, pipe.vae):
            part.requires_grad_(False).eval()
        self._layers = unet_layers(pipe.unet)

    @staticmethod
    def load(model: str, dtype: torch.dtype = torch.float32) -> DiffusersHost:
        """Load ``demo`` or a diffusers folder (safetensors only, nothing is downloaded).

        Raises:
            SepMEError: no such folder, another kind of pipeline, damaged files.
        """
        folder = DEMO if model == "demo" else Path(model)
        if not (folder / "model_index.json").is_file():
            raise SepMEError(f"{folder} is no diffusers folder (it has no model_index.json); name one, or 'demo' for the embedded model.")
        try:
            kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
            if kind != "StableDiffusionPipeline":
                raise SepMEError(f"{folder} holds a {str(kind)[:60]}; only StableDiffusionPipeline is supported so far.")
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, safety_checker=None, low_cpu_mem_usage=False
            ).to(dtype)
        except SepMEError:
            raise
        except Exception as error:  # whatever a broken folder makes the loaders raise
            if out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [""])[0][:160]
            raise SepMEError(f"{folder} cannot be loaded ({type(error).__name__}: {reason}); check that its files are complete.") from None
        return DiffusersHost(pipe)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def encode(self, prompts: Sequence[str]) -> Encoding:
        tokens = self.pipe.tokenizer(
            list(prompts), padding="max_length", max_length=self.pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.device)
        with torch.no_grad():
            context = self.pipe.text_encoder(ids)[0]
        ends = (ids == self.pipe.tokenizer.eos_token_id).int().argmax(dim=1)
        return Encoding(context, torch.arange(ids.shape[1], device=ids.device)[None] <= ends[:, None])

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=context).sample

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return dict(self._layers)

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(x_0, noise, t)

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal start latents ``(seeds, 4, h, w)``, one generator a seed."""
        size = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, size, size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self.device, self.unet.dtype)

    @property
    def timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def _runs(self, context: Tensor, empty: Tensor, generator: torch.Generator, steps: int, guidance: float) -> Iterator[Tensor]:
        """DDIM runs of the model as it is: the start latents, then the latents after every step."""
        x = self.latents(torch.randint(1 << 31, (len(context),), generator=generator).tolist())
        self.scheduler.set_timesteps(steps, device=self.device)
        both = torch.cat([empty, context])
        yield x
        for t in self.scheduler.timesteps:
            nothing, something = self.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
            x = self.scheduler.step(nothing + guidance * (something - nothing), t, x).prev_sample
            yield x

    def trajectory(
        self,
        context: Tensor,
        empty: Tensor,
        generator: torch.Generator,
        steps: int = 25,
        guidance: float = 3.0,
        on_step: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        points = []
        for x in self._runs(context, empty, generator, steps, guidance):
            points.append(x)
            if on_step is not None:
                on_step()
        return torch.stack(points[:-1]), self.scheduler.timesteps.clone()

    def drawn(
        self,
        context: Tensor,
        empty: Tensor,
        generator: torch.Generator,
        steps: int = 50,
        guidance: float = 7.5,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        for x in self._runs(context, empty, generator, steps, guidance):  # noqa: B007
            if on_step is not None:
                on_step()
        return x

    @property
    def image_size(self) -> int:
        return int(self.unet.config.sample_size * self.pipe.vae_scale_factor)

    def encode_images(self, images: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
        latents = []
        for part in images.split(4):
            with torch.no_grad():
                encoded = self.pipe.vae.encode(part.to(self.device, self.pipe.vae.dtype))
            x_0 = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            latents.append((x_0 * self.pipe.vae.config.scaling_factor).to(self.unet.dtype))
            if on_step is not None:
                on_step()
        return torch.cat(latents)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        composition: Composition | None = None,
        toggles: Toggles | None = None,
        *,
        negative: str = "",
        steps: int = 25,
        guidance: float = 3.0,
        gate: bool = True,
        keep: bool = True,
        latents_only: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw one image a prompt and seed, each prompt with its own toggles (its tags beat ``toggles``).

        Returns:
            images ``(n, 3, height, width)`` float32 in [-1, 1], or latents ``(n, 4, h, w)``.
        """
        texts, tags = zip(*(parse_tags(p) for p in prompts), strict=True)
        negative_text, negative_tags = parse_tags(negative)
        cond = self.encode(texts).context
        uncond = self.encode([negative_text]).context.expand_as(cond)

        def step_end(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(index)
            return kwargs

        def run() -> Tensor:
            out = self.pipe(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond,
                latents=self.latents(seeds),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
                callback_on_step_end=step_end,
            )
            if latents_only:
                return out.images
            return self.pipe.vae.decode(out.images / self.pipe.vae.config.scaling_factor).sample.float().clamp(-1, 1)

        with torch.no_grad():
            if composition is None or not composition.deltas:
                return run()
            base = toggles or {}
            rows = [merge(base, t) for t in tags]
            if guidance > 1:
                rows = [merge(base, negative_tags)] * len(rows) + rows
            table = strengths(rows, composition.names)
            with KVProjector(self._layers, composition, gate=gate, keep=keep).attached(table):
                return run()
