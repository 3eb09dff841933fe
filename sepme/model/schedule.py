"""Noise schedules and the one sampler: ``x_t = a x_0 + s ε`` with a model that predicts ε, v or the flow's velocity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite
from .blocks import TextBlocks
from .lengths import Part, whole
from .protocols import AttentionLayer, Denoiser

Prediction = Literal["epsilon", "v_prediction", "flow"]


class Sampling(NamedTuple):
    """How a picture is sampled: denoising steps, and the strength of classifier-free guidance."""

    steps: int
    guidance: float


TRAJECTORY = Sampling(25, 3.0)  # points that training takes x_t from, and pictures where nothing else is said
CLEAN = Sampling(50, 7.5)  # pictures that training noises
GLANCE = Sampling(8, 3.0)  # pictures to look at while training runs, and of the embedded model


@dataclass(frozen=True)
class Schedule:
    """``x_t = a_t x_0 + s_t ε`` at discrete training timesteps; ``t = 0`` has the least noise.

    Attributes:
        a, s: ``(timesteps,)`` float32.
        prediction: what the model returns: ε, ``v = a ε − s x_0``, or the velocity ``ε − x_0`` of a flow.
    """

    a: Tensor
    s: Tensor
    prediction: Prediction = "epsilon"

    @staticmethod
    def diffusion(alphas: Tensor, prediction: Prediction = "epsilon") -> Schedule:
        """From the cumulative ``ᾱ_t`` ``(timesteps,)``: ``a = √ᾱ``, ``s = √(1−ᾱ)``."""
        alphas = alphas.float()
        return Schedule(alphas.sqrt(), (1 - alphas).sqrt(), prediction)

    @staticmethod
    def flow(timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """Rectified flow: ``a = 1 − s`` with s evenly spaced in (0, 1], shifted towards noise as ``k s / (1 + (k − 1) s)``."""
        s = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        s = shift * s / (1 + (shift - 1) * s)
        return Schedule((1 - s).float(), s.float(), "flow")

    def __len__(self) -> int:
        return len(self.a)

    def times(self, steps: int) -> Tensor:
        """``(steps,)`` int64, descending: every ``timesteps / steps``-th, shifted by one as Stable Diffusion does; a flow's begin at
        pure noise."""
        stride = len(self) // steps
        if self.prediction == "flow":
            return len(self) - 1 - torch.arange(steps) * stride
        return (torch.arange(steps) * stride).flip(0) + 1

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at ``t`` ``(batch,)``, shaped to multiply ``like`` ``(batch, ...)``."""
        shape = (-1, *[1] * (like.dim() - 1))
        a, s = (table.to(like.device)[t.to(like.device)].reshape(shape) for table in (self.a, self.s))
        return a, s

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of clean latents at timesteps ``t`` ``(batch,)``."""
        a, s = self.at(t, x_0)
        return (a * x_0.float() + s * noise.float()).to(x_0.dtype)

    def linear(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What objectives compare, of what the model returned: ε of a model that predicts ε or v; a flow's velocity as it is, since
        in ε it would vanish where pictures take shape."""
        if self.prediction != "v_prediction":
            return out
        a, s = self.at(t, x)
        return (a * out.float() + s * x.float()).to(out.dtype)

    def target(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """What :meth:`linear` gives of a model that errs nowhere, float32: the noise, of a flow the velocity."""
        return noise.float() - x_0.float() if self.prediction == "flow" else noise.float()

    def step(self, x: Tensor, predicted: Tensor, t: int, following: int | None) -> Tensor:
        """DDIM and Euler at once: ``a' x̂_0 + s' ε̂``, with what :meth:`linear` gives; ``following`` None: ``x̂_0`` itself."""
        a, s = self.a[t].to(x.device), self.s[t].to(x.device)
        if self.prediction == "flow":
            clean, noise = x - s * predicted, x + a * predicted
        else:
            clean, noise = (x - s * predicted) / a, predicted
        return clean if following is None else self.a[following].to(x.device) * clean + self.s[following].to(x.device) * noise


def runs(
    denoiser: Denoiser, schedule: Schedule, start: Tensor, context: Tensor, empty: Tensor | None, extra: Tensor | None, sampling: Sampling
) -> Iterator[Tensor]:
    """Denoising runs: the start latents, then the latents after every step.

    Args:
        start: ``(batch, ...)``.
        context, empty: ``(batch, tokens, d_in)``; without ``empty`` nothing guides.
        extra: pooled vectors of ``[empty; context]``.
    """
    both, x = context if empty is None else torch.cat([empty, context]), start
    yield x
    times = schedule.times(sampling.steps).tolist()
    last = None if schedule.prediction == "flow" else 0
    for t, following in zip(times, [*times[1:], last], strict=True):
        batch = torch.full((len(both),), t, device=x.device)
        predicted = denoiser.predict(x if empty is None else torch.cat([x, x]), batch, both, extra).float()
        if empty is not None:
            uncond, cond = predicted.chunk(2)
            predicted = uncond + sampling.guidance * (cond - uncond)
        x = schedule.step(x.float(), predicted, t, following).to(start.dtype)
        yield check_finite(x, "UNet", f"timestep {t}")


class ScheduledDenoiser(ABC):
    """A model with a :class:`Schedule` as :class:`~.protocols.Denoiser`. A host's subclass brings the model itself.

    Attributes:
        schedule: of the model.
    """

    schedule: Schedule

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model runs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """What the model itself returns; all but ``extra`` are on its device, in its dtype."""

    @abstractmethod
    def attention_layers(self) -> Mapping[str, AttentionLayer] | TextBlocks: ...

    @property
    def timesteps(self) -> int:
        return len(self.schedule)

    def parts(self, context: Tensor, t: Tensor) -> list[Part]:
        """The rows of a batch that the model reads at once; all of them, but for models that read every prompt at its own length."""
        return [Part(torch.arange(len(context)), context.shape[1])]

    def differentiating(self) -> AbstractContextManager[Any]:
        """What a prediction and the way back through it run in."""
        return nullcontext()

    def guided(self, sampling: Sampling) -> Sampling:
        """How the model's own runs are guided: not by the empty prompt where the strength of guidance is a number that it is given."""
        return sampling

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        x, t = x_t.to(self.device, self.dtype), t.to(self.device)
        context, parts = context.to(self.device, self.dtype), self.parts(context, t)
        if len(parts) == 1:
            return self.schedule.linear(self.forward(x, t, context[:, : parts[0].tokens], extra), x, t)
        more = [None if extra is None else extra[p.rows] for p in parts]
        made = [self.forward(x[p.rows], t[p.rows], context[p.rows, : p.tokens], e) for p, e in zip(parts, more, strict=True)]
        return self.schedule.linear(whole(parts, made), x, t)

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.schedule.noised(x_0, noise, t)

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal start latents ``(seeds, ...)``, one generator per seed."""
        noise = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self.device, self.dtype)

    def _runs(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any, sampling: Sampling, on_step: Callable[[], None] | None
    ) -> Iterator[Tensor]:
        start = self.latents(torch.randint(1 << 31, (len(context),), generator=generator).tolist())
        sampling = self.guided(sampling)
        guide = None if sampling.guidance == 1 else empty
        extra = extra if guide is not None or extra is None else extra[len(empty) :]
        for x in runs(self, self.schedule, start, context, guide, extra, sampling):
            yield x
            if on_step is not None:
                on_step()

    def trajectory(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        *points, _ = self._runs(context, empty, generator, extra, TRAJECTORY, on_step)
        return torch.stack(points), self.schedule.times(TRAJECTORY.steps).to(self.device)

    def sample(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        return deque(self._runs(context, empty, generator, extra, CLEAN, on_step), maxlen=1).pop()
