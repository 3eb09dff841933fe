"""DDIM with guidance, written for the protocols, for hosts that bring no scheduler of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_finite
from .protocols import AttentionLayer, Denoiser


def timesteps(steps: int, total: int) -> Tensor:
    """``(steps,)`` int64, descending: every ``total / steps``-th training timestep, shifted by one as Stable Diffusion does."""
    return (torch.arange(steps) * (total // steps)).flip(0) + 1


def runs(
    denoiser: Denoiser, alphas: Tensor, start: Tensor, context: Tensor, empty: Tensor, extra: Tensor | None, steps: int, guidance: float
) -> Iterator[Tensor]:
    """Denoising runs: the start latents, then the latents after every step.

    Args:
        alphas: cumulative ``ᾱ_t`` ``(timesteps,)``. start: ``(batch, ...)``.
        context, empty: ``(batch, tokens, d_in)``. extra: pooled vectors of ``[empty; context]``.
    """
    alphas = alphas.to(start.device, torch.float32)
    both, x = torch.cat([empty, context]), start
    yield x
    times = timesteps(steps, len(alphas)).tolist()
    for t, following in zip(times, [*times[1:], 0], strict=True):
        batch = torch.full((2 * len(x),), t, device=x.device)
        uncond, cond = denoiser.predict(torch.cat([x, x]), batch, both, extra).float().chunk(2)
        noise = uncond + guidance * (cond - uncond)
        clean = (x.float() - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        x = (alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * noise).to(start.dtype)
        yield check_finite(x, "UNet", f"timestep {t}")


class DDIMDenoiser(ABC):
    """A model of discrete timesteps as :class:`~.protocols.Denoiser`: ``x_t = √ᾱ x_0 + √(1−ᾱ) ε``, always ε. A host's subclass brings
    the model itself.

    Attributes:
        alphas: ``ᾱ_t`` ``(timesteps,)`` float32. predicts_v: whether the model returns v instead of ε.
    """

    alphas: Tensor
    predicts_v: bool

    @property
    @abstractmethod
    def latents(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """What the model itself returns, ε or v; all but ``extra`` are on its device, in its dtype."""

    @abstractmethod
    def attention_layers(self) -> Mapping[str, AttentionLayer]: ...

    @property
    def timesteps(self) -> int:
        return len(self.alphas)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        x, t = x_t.to(self.device, self.dtype), t.to(self.device)
        out = self.forward(x, t, context.to(self.device, self.dtype), extra)
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
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any, steps: int, guidance: float, on_step: Callable[[], None] | None
    ) -> Iterator[Tensor]:
        seeds = torch.randint(1 << 31, (len(context),), generator=generator).tolist()
        start = torch.stack([torch.randn(self.latents, generator=torch.Generator().manual_seed(s)) for s in seeds])
        for x in runs(self, self.alphas, start.to(self.device, self.dtype), context, empty, extra, steps, guidance):
            yield x
            if on_step is not None:
                on_step()

    def trajectory(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        *points, _ = self._runs(context, empty, generator, extra, 25, 3.0, on_step)
        return torch.stack(points), timesteps(25, self.timesteps).to(self.device)

    def sample(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        return deque(self._runs(context, empty, generator, extra, 50, 7.5, on_step), maxlen=1).pop()
