"""Sets of pictures, drawn the same way under every method, so that equality with the stock model can be asked bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..model.protocols import Encoding
from ..plan.gate import ordinary_prompts
from .erasers import Eraser
from .judge import Judge
from .suite import Suite


@dataclass(frozen=True)
class Batch:
    """Prompts drawn together.

    Attributes:
        shows: the concept that each picture should show, if any. weight: of the whole prompt, as in ``(a star:1.4)``.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    shows: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """Pictures of a batch: accuracy (nan where nothing is to be seen), and which of them equal stock's bit for bit.

    Images are decoded when they are asked for: many at full size do not fit in memory.
    """

    accuracy: float
    same: Tensor
    latents: Tensor
    decode: Callable[[Tensor], Tensor]

    def pieces(self) -> Iterator[Tensor]:
        """Images ``(n, 3, h, w)`` in [-1, 1], a few at a time."""
        return (self.decode(x) for x in self.latents.split(32))

    def first(self, count: int) -> Tensor:
        return self.decode(self.latents[:count])


class Easel:
    """Draws batches, a few pictures at once, and remembers the stock model's latents."""

    def __init__(self, host: Any, judge: Judge, suite: Suite, check: Callable[[], None]) -> None:
        self.host, self.judge, self.suite, self.check = host, judge, suite, check
        self.options = {"steps": suite.steps, "guidance": suite.guidance, "latents_only": True}
        self._stock: dict[Batch, Drawn] = {}

    def stock(self, batch: Batch) -> Drawn:
        """The stock model's pictures."""
        if batch not in self._stock:
            latents = self._latents(batch, self.host.generate)
            self._stock[batch] = self._judged(latents, batch, torch.ones(len(latents), dtype=torch.bool))
        return self._stock[batch]

    def draw(self, batch: Batch, eraser: Eraser, erased: Sequence[str], gate: bool = True) -> Drawn:
        """Pictures with concepts erased; those equal to stock's are not looked at again."""
        stock, latents = self.stock(batch), self._latents(batch, self._by(eraser, erased, gate))
        same = (latents == stock.latents).flatten(1).all(1)
        return stock if same.all() else self._judged(latents, batch, same)

    def fresh(self, batch: Batch, eraser: Eraser | None, erased: Sequence[str], gate: bool) -> Drawn:
        """Pictures of prompts that mean something else every time; nothing is compared or remembered."""
        latents = self._latents(batch, self.host.generate if eraser is None else self._by(eraser, erased, gate))
        return self._judged(latents, batch, torch.zeros(len(latents), dtype=torch.bool))

    def _by(self, eraser: Eraser, erased: Sequence[str], gate: bool) -> Callable[..., Tensor]:
        return lambda prompts, seeds, **options: eraser.generate(self.host, prompts, seeds, erased, gate, **options)

    def _latents(self, batch: Batch, generate: Callable[..., Tensor]) -> Tensor:
        """Drawn ``suite.batch`` at once, under every method in the same company: matrix products of other row counts round differently."""
        parts, size = [], self.suite.batch
        for i in range(0, len(batch.prompts), size):
            self.check()
            prompts = list(batch.prompts[i : i + size])
            with _weighed(self.host, batch.weight, len(prompts)):
                parts.append(generate(prompts, list(batch.seeds[i : i + size]), **self.options).cpu())
        return torch.cat(parts)

    def _judged(self, latents: Tensor, batch: Batch, same: Tensor) -> Drawn:
        accuracy = float("nan")
        if batch.shows:
            size = self.suite.batch
            parts = zip(latents.split(size), (batch.shows[i : i + size] for i in range(0, len(latents), size)), strict=True)
            accuracy = float(torch.cat([self.judge.correct(self.decode(x), shows) for x, shows in parts]).float().mean())
        return Drawn(accuracy, same, latents, self.decode)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.host.pipe.vae
        parts = []
        for x in latents.split(16):
            scaled = x.to(self.host.device, vae.dtype) / vae.config.scaling_factor
            parts.append(vae.decode(scaled).sample.float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    # --- the sets of a suite

    def own(self, name: str, unseen: bool = False) -> Batch:
        """A concept's own prompts."""
        return self._cycled(self.suite.prompts(name, unseen), name, self.suite.names.index(name) * 1000 + (500 if unseen else 0))

    def weighted(self, name: str) -> Batch:
        """Its prompts with more weight."""
        return replace(self.own(name), weight=1.4)

    def _cycled(self, prompts: Sequence[str], name: str, offset: int) -> Batch:
        count = self.suite.images
        chosen = tuple(prompts[i % len(prompts)] for i in range(count))
        return Batch(chosen, tuple(self.suite.seed + offset + i for i in range(count)), (name,) * count)

    def others(self, name: str) -> Batch:
        """As many prompts of the other concepts."""
        rest = [n for n in self.suite.names if n != name]
        index = self.suite.names.index(name)
        chosen = [rest[(i + index) % len(rest)] for i in range(self.suite.images)]
        prompts = tuple(self.suite.prompts(n)[i % len(self.suite.prompts(n))] for i, n in enumerate(chosen))
        return Batch(prompts, tuple(self.suite.seed + 40_000 + 1000 * index + i for i in range(len(chosen))), tuple(chosen))

    def both(self, name: str) -> Batch:
        """Prompts that hold the concept and another, which should be seen."""
        pairs, index = self.suite.cooccurring(name), self.suite.names.index(name)
        chosen = [pairs[i % len(pairs)] for i in range(self.suite.images)]
        seeds = tuple(self.suite.seed + 60_000 + 1000 * index + i for i in range(len(chosen)))
        return Batch(tuple(p for p, _ in chosen), seeds, tuple(n for _, n in chosen))

    def neighbours(self) -> Batch:
        """Concepts of the same kinds that no method was told of."""
        names = [n for given in self.suite.neighbours.values() for n in given]
        chosen = [names[i % len(names)] for i in range(max(len(names), 2 * self.suite.images))] if names else []
        prompts = tuple(self.suite.prompts(n)[i // len(names) % len(self.suite.prompts(n))] for i, n in enumerate(chosen))
        return Batch(prompts, tuple(self.suite.seed + 100_000 + i for i in range(len(chosen))), tuple(chosen))

    def synonyms(self, name: str) -> Batch | None:
        """A concept in other words, if the suite has some."""
        prompts = self.suite.synonyms.get(name)
        return self._cycled(prompts, name, 110_000 + self.suite.names.index(name) * 1000) if prompts else None

    def unrelated(self) -> Batch:
        """Prompts that hold no concept: the suite's, else ordinary ones that calibrated no gate."""
        prompts = (self.suite.unrelated or ordinary_prompts()[1::2])[: 4 * self.suite.images]
        return Batch(tuple(prompts), tuple(self.suite.seed + 80_000 + i for i in range(len(prompts))))

    def preserved(self) -> Batch:
        """The empty prompt and what is preserved."""
        prompts = ("", *self.suite.preserve[: 2 * self.suite.images])
        return Batch(prompts, tuple(self.suite.seed + 90_000 + i for i in range(len(prompts))))


@contextmanager
def _weighed(host: Any, weight: float, count: int) -> Iterator[None]:
    """Prompts, ``count`` at once, with a weight as ComfyUI reads it: ``c ← c_∅ + weight · (c − c_∅)``. A negative prompt keeps 1."""
    if weight == 1:
        yield
        return
    plain, empty = host.encode, host.encode([""]).context

    def encode(prompts: Sequence[str], *rest: Any) -> Encoding:
        encoding = plain(prompts, *rest)
        return encoding._replace(context=empty + weight * (encoding.context - empty)) if len(prompts) == count else encoding

    host.encode = encode
    try:
        yield
    finally:
        host.encode = plain
