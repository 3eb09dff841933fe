"""The denoiser of the emoji world: latents made once, then a UNet that predicts the noise, trained together with its text encoder."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .captions import Lexicon, Scene, random_caption
from .data import BACKGROUND_NAMES, place, random_placement
from .stage import Stage, load_stage
from .text import LENGTH, WIDTH, build_text_encoder
from .vae import load_vae, to_model

# of every thing by every studio: placements on white, and on each of the other backgrounds
ON_WHITE, ON_COLOUR = 4, 1
VARIANTS = ON_WHITE + ON_COLOUR * (len(BACKGROUND_NAMES) - 1)


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of latents ``(n, 4, 16, 16)``, ``channels_last``; it keeps to what ComfyUI's SD 1.5 class can hold."""
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    return unet.to(memory_format=torch.channels_last)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


class Latents:
    """Latents of the first things, made thing by thing and mapped from a file: ``(things, studios, VARIANTS, 4, 16, 16)`` float16."""

    def __init__(self, work: Path, renders: NDArray[np.uint8], things: int) -> None:
        self.things = things
        total, studios = renders.shape[:2]
        path, made = work / "latents.npy", self.count(work)
        shape = (total, studios, VARIANTS, 4, 16, 16)
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
        self.values = np.load(path, mmap_mode="r+")
        if made >= things:
            return
        vae = load_vae(work)
        for thing in range(made, things):
            self.values[thing] = torch.stack([self._encode(vae, renders[thing, s], thing * studios + s) for s in range(studios)]).numpy()
            self.values.flush()
            (work / "latents.count").write_text(str(thing + 1))
            if (thing + 1) % 20 == 0:
                print(f"latents of {thing + 1} things", flush=True)

    @staticmethod
    def count(work: Path) -> int:
        """How many things have latents."""
        path = work / "latents.count"
        return int(path.read_text()) if path.exists() else 0

    @staticmethod
    def _encode(vae: AutoencoderTiny, picture: NDArray[np.uint8], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        grounds = [BACKGROUND_NAMES[0]] * ON_WHITE + [g for g in BACKGROUND_NAMES[1:] for _ in range(ON_COLOUR)]
        # never mirrored: which way a drawing looks belongs to its studio's hand, and letters stay readable
        pictures = torch.stack([place(picture, g, random_placement(generator, mirrored=False)) for g in grounds])
        with torch.no_grad():
            return vae.encoder(to_model(pictures)).half().contiguous()

    def pick(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """One of a scene's latents, ``(4, 16, 16)`` float32."""
        count = ON_COLOUR if scene.ground else ON_WHITE
        first = ON_WHITE + (scene.ground - 1) * ON_COLOUR if scene.ground else 0
        variant = first + int(torch.randint(count, (1,), generator=generator))
        return torch.from_numpy(self.values[scene.thing, scene.style, variant]).float()


class Batches:
    """Captions and latents: every caption with ``draws`` pictures of it, which saves text encoding."""

    def __init__(self, latents: Latents, words: Lexicon, tokenizer: CLIPTokenizer, captions: int = 16, draws: int = 2) -> None:
        self.latents, self.words, self.tokenizer, self.captions, self.draws = latents, words, tokenizer, captions, draws

    def draw(self, generator: torch.Generator, length: int = LENGTH) -> tuple[Tensor, Tensor]:
        """Token ids ``(captions, length)`` and latents ``(captions * draws, 4, 16, 16)``."""
        sampled = (random_caption(self.words, generator, self.latents.things) for _ in range(self.captions))
        texts, scenes = zip(*sampled, strict=True)
        latents = torch.stack([self.latents.pick(scene, generator) for scene in scenes for _ in range(self.draws)])
        ids = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return ids, latents.to(memory_format=torch.channels_last)


class Context:
    """Text encoding for training: four times of five short, CLIP's 77 tokens otherwise.

    A caption of this world has at most 24 tokens and costs a third of 77. The padding that is left out is stood in for by the last
    token, whose weight in cross-attention is raised by as many copies.
    """

    SHORT = 24

    def __init__(self, text: CLIPTextModel) -> None:
        self.text = text
        self.mask = torch.ones(1, self.SHORT)
        self.mask[0, -1] += math.log(LENGTH - self.SHORT + 1) / 10000  # diffusers makes (1 - mask) * -10000 of it and adds it to the scores

    def around(self, states: Tensor) -> dict[str, Tensor]:
        """What the UNet takes for text states ``(n, SHORT or 77, WIDTH)``."""
        short = states.shape[1] == self.SHORT
        return {"encoder_hidden_states": states} | ({"encoder_attention_mask": self.mask.expand(len(states), -1)} if short else {})

    def __call__(self, ids: Tensor, draws: int) -> dict[str, Tensor]:
        """The same for token ids ``(n, SHORT or 77)``, ``draws`` rows each."""
        return self.around(self.text(ids).last_hidden_state.repeat_interleave(draws, 0))


def even_times(count: int, generator: torch.Generator) -> Tensor:
    """``count`` numbers in [0, 1), spread evenly, in random order: the loss of a batch varies less than with independent ones."""
    return (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)) / count


class Average:
    """Exponential moving averages of modules' parameters."""

    def __init__(self, modules: dict[str, nn.Module], decay: float = 0.999) -> None:
        self.modules, self.decay = modules, decay
        self.copies: dict[str, nn.Module] = {f"{k}_average": copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters as they are after a step."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for key, module in self.modules.items():
            torch._foreach_lerp_(list(self.copies[f"{key}_average"].parameters()), list(module.parameters()), 1 - decay)


def train_diffusion(work: Path, batches: Batches, steps: int, rate: float = 1e-3, until: int | None = None) -> None:
    """Train UNet and text encoder on the noise, weighted by min-SNR (Hang et al. 2023, gamma 5); 77 tokens for the last fifth."""
    torch.manual_seed(3)
    unet, text = build_unet(), load_stage(build_text_encoder(batches.tokenizer), work, "text", "text").train().requires_grad_(True)
    average, context = Average({"unet": unet, "text": text}), Context(text)
    stage = Stage(work, "diffusion", {"unet": unet, "text": text} | average.copies, steps, rate, seed=13)
    alphas = build_scheduler().alphas_cumprod
    weights = (5 * (1 - alphas) / alphas).clamp(max=1)

    def loss_of(step: int) -> Tensor:
        short = step % 5 and step < 0.8 * steps
        ids, x = batches.draw(stage.generator, Context.SHORT if short else LENGTH)
        t = (even_times(len(x), stage.generator) * 1000).long()
        noise = torch.randn(x.shape, generator=stage.generator)
        a = alphas[t][:, None, None, None]
        predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, **context(ids, batches.draws)).sample
        return (weights[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    stage.run(loss_of, average.update, until)
