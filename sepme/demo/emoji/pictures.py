"""Pictures of captions, and how many of them the classifier reads as what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...evaluate.network import Network
from .captions import Scene, caption_of
from .data import BACKGROUND_NAMES, place
from .diffusion import build_scheduler, build_unet
from .flow import LENGTH, build_flow, encode, sample
from .stage import load_stage
from .text import build_text_encoder, load_tokenizer
from .things import STYLES, THINGS, name_of
from .vae import load_vae, to_model

Painter = Callable[[Sequence[str], int], Tensor]


def start_latents(count: int, seed: int) -> Tensor:
    """Noise ``(count, 4, 16, 16)``; picture i has the seed ``seed + i``."""
    return torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])


def unet_painter(work: Path, steps: int, guidance: float) -> Painter:
    """DDIM with the averaged weights of the diffusion stage: captions and a seed -> pictures ``(n, 3, 128, 128)`` in [-1, 1]."""
    tokenizer = load_tokenizer(work / "tokenizer")
    unet = load_stage(build_unet(), work, "diffusion", "unet_average")
    text, vae = load_stage(build_text_encoder(tokenizer), work, "diffusion", "text_average"), load_vae(work)
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    alphas, times = scheduler.alphas_cumprod, scheduler.timesteps.tolist()

    @torch.no_grad()
    def paint(captions: Sequence[str], seed: int) -> Tensor:
        ids = tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = text(ids).last_hidden_state
        context = torch.cat([states[:1].expand(len(captions), -1, -1), states[1:]])
        x = start_latents(len(captions), seed)
        for t, following in zip(times, [*times[1:], 0], strict=True):
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            noise = uncond + guidance * (cond - uncond)
            clean = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
            x = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * noise
        return vae.decoder(x).clamp(-1, 1)

    return paint


def flow_painter(work: Path, steps: int, guidance: float) -> Painter:
    """Euler's method with the averaged weights of the flow stage."""
    tokenizer = load_tokenizer(work / "tokenizer")
    model, vae = load_stage(build_flow(), work, "flow", "flow_average"), load_vae(work)
    text = load_stage(build_text_encoder(tokenizer), work, "flow", "text")

    @torch.no_grad()
    def paint(captions: Sequence[str], seed: int) -> Tensor:
        ids = tokenizer(["", *captions], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        context, mask = encode(text, ids, tokenizer.eos_token_id)
        count = len(captions)
        empty, no = context[:1].expand(count, -1, -1), mask[:1].expand(count, -1)
        x = sample(model, start_latents(count, seed), context[1:], mask[1:], empty, no, steps, guidance)
        return vae.decoder(x).clamp(-1, 1)

    return paint


def asked(things: int, count: int, seed: int) -> list[tuple[str, Scene]]:
    """Captions that name a thing and a studio, every fourth a background too; things take turns."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        style, ground, which = (int(torch.randint(n, (1,), generator=generator)) for n in (len(STYLES), len(BACKGROUND_NAMES), 60))
        scene = Scene(i % things, style, ground if i % 4 == 3 else 0)
        named = BACKGROUND_NAMES[scene.ground] if i % 4 == 3 else ""
        result.append((caption_of(name_of(THINGS[scene.thing]), STYLES[style], named, which), scene))
    return result


def read(paint: Painter, classifier: Network, things: int, count: int, seed: int = 500) -> tuple[Tensor, Tensor]:
    """Scenes ``(count, 3)`` as asked for and as the classifier reads the pictures."""
    pairs, found = asked(things, count, seed), []
    for first in range(0, count, 18):
        found.append(classifier.predict(paint([caption for caption, _ in pairs[first : first + 18]], seed + first)))
    return torch.tensor([scene for _, scene in pairs]), torch.cat(found)


def read_accuracy(wanted: Tensor, found: Tensor) -> dict[str, float]:
    """Share of scenes ``(n, 3)`` whose thing, style and background are read as asked, and the same of each studio's."""
    right = (wanted == found).float()
    whole = {name: round(float(share), 4) for name, share in zip(("thing", "style", "background"), right.mean(0), strict=True)}
    return whole | {style: round(float(right[wanted[:, 1] == i, 1].mean()), 4) for i, style in enumerate(STYLES)}


def grid(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of pictures in [-1, 1] as one image."""
    joined = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    return Image.fromarray(((joined / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def sheet(paint: Painter, things: Sequence[int], seed: int = 7) -> Image.Image:
    """A row per thing, a column per studio."""
    return grid([paint([caption_of(name_of(THINGS[t]), style) for style in STYLES], seed) for t in things])


def originals(renders: NDArray[np.uint8], things: Sequence[int]) -> Image.Image:
    """The studios' own drawings, laid out as ``sheet`` lays out generated ones."""
    return grid([to_model(torch.stack([place(renders[t, s]) for s in range(renders.shape[1])])) for t in things])
