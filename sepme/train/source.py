"""Where ``x_t`` comes from: points of denoising runs, or noised images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import following_seed
from ..model.protocols import Denoiser, Encoding
from .options import TrainOptions


class Draw(NamedTuple):
    """``x_t`` ``(batch, ...)``, ``t`` ``(batch,)`` int64 and the indices ``(batch,)`` of the concept's prompts."""

    x_t: Tensor
    t: Tensor
    prompts: Tensor


class Source(Protocol):
    """Where training takes x_t from."""

    def draw(self, generator: torch.Generator, batch: int) -> Draw:
        """The next batch; all randomness is the generator's."""
        ...


@dataclass(frozen=True)
class Trajectories:
    """Points ``(steps, runs, ...)`` at times ``(steps,)`` of runs with the prompts ``(runs,)``."""

    points: Tensor
    times: Tensor
    prompts: Tensor

    def draw(self, generator: torch.Generator, batch: int) -> Draw:
        run = torch.randint(len(self.prompts), (batch,), generator=generator)
        at = torch.randint(len(self.times), (batch,), generator=generator)
        return Draw(self.points[at, run], self.times[at], self.prompts[run])


@dataclass(frozen=True)
class Images:
    """Clean latents ``(n, ...)``, noised at every draw at t uniform over all timesteps.

    ``prompts`` ``(n,)`` drew them; None: any of the concept's ``count`` prompts may stand beside any image.
    """

    latents: Tensor
    prompts: Tensor | None
    count: int
    denoiser: Denoiser

    def draw(self, generator: torch.Generator, batch: int) -> Draw:
        index = torch.randint(len(self.latents), (batch,), generator=generator)
        t = torch.randint(self.denoiser.timesteps, (batch,), generator=generator)
        x_0 = self.latents[index]
        noise = torch.randn(x_0.shape, generator=generator, dtype=torch.promote_types(x_0.dtype, torch.float32)).to(x_0)
        if self.prompts is not None:
            prompts = self.prompts[index]
        else:
            prompts = torch.randint(self.count, (batch,), generator=generator)
        t = t.to(x_0.device)
        return Draw(self.denoiser.noise(x_0, noise, t), t, prompts)


class Pictures(NamedTuple):
    """A folder's pictures as clean latents ``(n, ...)``, and the SHA-256 of their pixels for the recipe."""

    latents: Tensor
    sha256: str

    def facts(self) -> dict[str, Any]:
        """What the recipe says of them."""
        return {"count": len(self.latents), "sha256": self.sha256}


def make_source(
    denoiser: Denoiser,
    own: Encoding,
    empty: Encoding,
    anchor: Encoding,
    options: TrainOptions,
    pictures: Pictures | None,
    check: Callable[[], None] | None = None,
) -> Source:
    """A concept's source of x_t.

    Args:
        own: the concept's prompts.
        empty: the empty prompt, one row.
        anchor: the concept's anchor, one row.
        pictures: the user's own pictures instead of what ``options.source`` says.
        check: called between denoising steps; it may raise :class:`~sepme.errors.Interrupted`.
    """
    if pictures is not None:
        return Images(pictures.latents, None, len(own.context), denoiser)
    generator = torch.Generator().manual_seed(following_seed(options.seed))
    prompts = torch.randint(len(own.context), (options.trajectories,), generator=generator)
    empty = empty.rows([0] * len(prompts))
    rows = anchor.rows([0] * len(prompts)) if options.source == "anchor" else own.rows(prompts)
    extra = () if rows.pooled is None or empty.pooled is None else (torch.cat([empty.pooled, rows.pooled]),)
    with torch.no_grad():
        if options.source != "trajectory":
            latents = denoiser.sample(rows.context, empty.context, generator, *extra, on_step=check)
            return Images(latents, prompts if options.source == "drawn" else None, len(own.context), denoiser)
        return Trajectories(*denoiser.trajectory(rows.context, empty.context, generator, *extra, on_step=check), prompts)
