"""Erase a concept of a model that is no Stable Diffusion: a diffusion model of points in the plane, trained here in seconds.

``python examples/own_model.py points.png`` trains it, erases the word "circle", and draws stock, erased and given back.

What a model of your own has to bring is two classes: a text encoder with ``encode(prompts)``, and a denoiser with its schedule, its
forward pass and its cross-attention modules (each with ``to_q``, ``to_k``, ``to_v`` and ``heads``). Neither inherits from ours unless
it wants to: see ``sepme/model/protocols.py``.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepme import Composition, Concept, ConceptBook, Encoding, KVProjector, Planner, Schedule, ScheduledDenoiser, TrainOptions, make_delta
from sepme.model.schedule import Sampling, runs

FIGURES = ("circle", "square", "triangle", "line")
TEMPLATES = ("{}", "a {}", "one {}", "a picture of a {}")
D_IN, TOKENS = 32, 8
SAMPLING = Sampling(steps=25, guidance=1.0)


def points(figure: str, count: int, generator: torch.Generator) -> Tensor:
    """Points ``(count, 2)`` on a figure of about unit size."""
    u = torch.rand(count, generator=generator)
    if figure in ("square", "triangle"):
        n = 4 if figure == "square" else 3
        corners = torch.tensor([[math.sin(2 * math.pi * (i + 0.5) / n), math.cos(2 * math.pi * (i + 0.5) / n)] for i in range(n + 1)])
        side = (u * n).long()
        xy = torch.lerp(corners[side], corners[side + 1], (u * n - side)[:, None])
    elif figure == "line":
        xy = torch.stack([2 * u - 1, 2 * u - 1], dim=1)
    else:
        xy = torch.stack([(2 * math.pi * u).cos(), (2 * math.pi * u).sin()], dim=1)
    return xy + 0.03 * torch.randn(count, 2, generator=generator)


class Words:
    """A text encoder: a fixed random vector for every word and every place."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        rows, mask = [], []
        for prompt in prompts:
            words = ["<start>", *prompt.lower().split()[: TOKENS - 2], "<end>"]
            mask.append([i < len(words) for i in range(TOKENS)])
            words += ["<end>"] * (TOKENS - len(words))
            rows.append(torch.stack([self._vector(w) + 0.2 * self._vector(f"place {i}") for i, w in enumerate(words)]))
        return Encoding(torch.stack(rows), torch.tensor(mask))

    @staticmethod
    def _vector(word: str) -> Tensor:
        return torch.randn(D_IN, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


class CrossAttention(nn.Module):
    """Points look at words."""

    heads = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(D_IN, width, bias=False), nn.Linear(D_IN, width, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.to_q(x)[:, None], self.to_k(context), self.to_v(context))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]


class PointModel(nn.Module):
    """Predicts the noise of points ``(n, 2)`` at times ``(n,)``, each under a prompt of its own."""

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2 + 16, width), nn.Linear(width, 2)
        self.attention = nn.ModuleList(CrossAttention(width) for _ in range(depth))
        self.mix = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        waves = t[:, None].float() / 1000 * math.pi * 2.0 ** torch.arange(8)
        x = self.enter(torch.cat([x, waves.sin(), waves.cos()], dim=1))
        for attention, mix in zip(self.attention, self.mix, strict=True):
            x = x + attention(x, context)
            x = x + mix(x)
        return self.leave(x)


class PointDenoiser(ScheduledDenoiser):
    """The model as SepME sees it."""

    latent_shape, device, dtype = (2,), torch.device("cpu"), torch.float32  # type: ignore[assignment]

    def __init__(self, model: PointModel) -> None:
        self.model, self.schedule = model, Schedule.diffusion(torch.linspace(0.9999, 0.01, 1000) ** 1.5)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: object = None) -> Tensor:
        return self.model(x, t, context)

    def attention_layers(self) -> dict[str, CrossAttention]:  # type: ignore[override]
        return {f"attention.{i}": layer for i, layer in enumerate(self.model.attention)}  # type: ignore[misc]


def train(encoder: Words, steps: int = 1500) -> PointDenoiser:
    """A model that knows the four figures."""
    torch.manual_seed(0)
    denoiser, generator = PointDenoiser(PointModel()), torch.Generator().manual_seed(1)
    prompts = ["", *(t.format(f) for f in FIGURES for t in TEMPLATES)]
    figures = ["", *(f for f in FIGURES for _ in TEMPLATES)]
    context = encoder.encode(prompts).context
    optimizer = torch.optim.AdamW(denoiser.model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        chosen = torch.randint(len(prompts), (16,), generator=generator).tolist()
        x_0 = torch.cat([points(figures[i] or FIGURES[step % len(FIGURES)], 32, generator) for i in chosen])  # "": any of them
        t = torch.randint(1000, (len(x_0),), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        loss = (denoiser.predict(denoiser.noise(x_0, noise, t), t, context[chosen].repeat_interleave(32, 0)) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    denoiser.model.requires_grad_(False)
    return denoiser


def sample(encoder: Words, denoiser: PointDenoiser, prompt: str, count: int = 400) -> Tensor:
    """Points ``(count, 2)``, always from the same noise."""
    context, empty = (encoder.encode([p]).context.expand(count, -1, -1) for p in (prompt, ""))
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        *_, last = runs(denoiser, denoiser.schedule, noise, context, empty, None, SAMPLING)
    return last


def main(path: str, steps: int = 1500) -> None:
    """Train, erase, and draw: stock, "circle" erased, given back."""
    encoder = Words()
    denoiser = train(encoder, steps)
    book = ConceptBook(tuple(Concept(f, tuple(t.format(f) for t in TEMPLATES), anchor="") for f in FIGURES))
    delta = make_delta(Planner(encoder, book), "circle", denoiser, TrainOptions(objective="closed-form"))
    projector = KVProjector(denoiser.attention_layers(), Composition((delta,)))
    stock = {f: sample(encoder, denoiser, f"a {f}") for f in FIGURES}
    with projector.attached(torch.ones(1)):
        erased = {f: sample(encoder, denoiser, f"a {f}") for f in FIGURES}
    restored = {f: sample(encoder, denoiser, f"a {f}") for f in FIGURES}
    for f in FIGURES:
        same = "bit for bit as before" if torch.equal(erased[f], stock[f]) else "changed"
        print(f"{f}: {same}; given back: {'bit for bit' if torch.equal(restored[f], stock[f]) else 'not the same'}")
    draw(path, {"stock": stock, "circle erased": erased, "given back": restored})


def draw(path: str, rows: dict[str, dict[str, Tensor]]) -> None:
    """A row of pictures for each state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), len(FIGURES), figsize=(2 * len(FIGURES), 2 * len(rows)), squeeze=False)
    for line, (title, clouds) in zip(axes, rows.items(), strict=True):
        for cell, (name, cloud) in zip(line, clouds.items(), strict=True):
            cell.scatter(*cloud.T, s=2)
            cell.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], title=f"{name}, {title}")
            cell.title.set_fontsize(8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "points.png")
