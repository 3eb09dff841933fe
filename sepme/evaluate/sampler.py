"""Pictures sampled the same way under every method, so that equality with the stock model can be asked bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.protocols import Encoding, EvaluationHost
from .classifiers import Classifier
from .erasers import Eraser
from .prompt_sets import Batch, PromptSets
from .suite import Suite


@dataclass(frozen=True)
class Sampled:
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
        """The first images ``(count, 3, h, w)`` in [-1, 1]."""
        return self.decode(self.latents[:count])


class Sampler:
    """Samples batches, a few pictures at once, and remembers the stock model's latents.

    Attributes:
        sets: the batches of the suite.
    """

    def __init__(self, host: EvaluationHost, classifier: Classifier, suite: Suite, check: Callable[[], None]) -> None:
        self.host, self.classifier, self.suite, self.check, self.sets = host, classifier, suite, check, PromptSets(suite)
        self.options = {"steps": suite.steps, "guidance": suite.guidance, "latents_only": True}
        self._stock: dict[Batch, Sampled] = {}
        self._pieces: dict[Batch, Tensor] = {}  # stock's latents, which longer and shorter batches share

    def stock(self, batch: Batch) -> Sampled:
        """The stock model's pictures."""
        if batch not in self._stock:
            parts = []
            for piece in batch.split(self.suite.batch):
                if piece not in self._pieces:
                    self._pieces[piece] = self._latents(piece, self.host.generate)
                parts.append(self._pieces[piece])
            latents = torch.cat(parts)
            self._stock[batch] = self._classified(latents, batch, torch.ones(len(latents), dtype=torch.bool))
        return self._stock[batch]

    def sample(self, batch: Batch, eraser: Eraser, erased: Sequence[str], gate: bool = True) -> Sampled:
        """Pictures with concepts erased; those equal to stock's are not looked at again."""
        stock, latents = self.stock(batch), self._latents(batch, self._by(eraser, erased, gate))
        same = (latents == stock.latents).flatten(1).all(1)
        return stock if same.all() else self._classified(latents, batch, same)

    def fresh(self, batch: Batch, eraser: Eraser | None, erased: Sequence[str], gate: bool) -> Sampled:
        """Pictures of prompts that mean something else every time; nothing is compared or remembered."""
        latents = self._latents(batch, self.host.generate if eraser is None else self._by(eraser, erased, gate))
        return self._classified(latents, batch, torch.zeros(len(latents), dtype=torch.bool))

    def _by(self, eraser: Eraser, erased: Sequence[str], gate: bool) -> Callable[..., Tensor]:
        return lambda prompts, seeds, **options: eraser.generate(self.host, prompts, seeds, erased, gate, **options)

    def _latents(self, batch: Batch, generate: Callable[..., Tensor]) -> Tensor:
        """``suite.batch`` at once, the same ones under every method: matrix products of other row counts round differently."""
        parts = []
        for piece in batch.split(self.suite.batch):
            self.check()
            with _weighed(self.host, batch.weight, len(piece.prompts)):
                parts.append(generate(list(piece.prompts), list(piece.seeds), **self.options).cpu())
        return torch.cat(parts)

    def _classified(self, latents: Tensor, batch: Batch, same: Tensor) -> Sampled:
        accuracy = float("nan")
        if batch.shows:
            size = self.suite.batch
            parts = zip(latents.split(size), (batch.shows[i : i + size] for i in range(0, len(latents), size)), strict=True)
            accuracy = float(torch.cat([self.classifier.correct(self.decode(x), shows) for x, shows in parts]).float().mean())
        return Sampled(accuracy, same, latents, self.decode)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(n, 3, h, w)`` in [-1, 1] of latents ``(n, ...)``, on the CPU."""
        return torch.cat([self.host.decode(x).cpu() for x in latents.split(16)])


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
