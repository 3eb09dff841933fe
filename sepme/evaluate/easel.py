"""Sets of pictures, drawn the same way under every method, so that equality with the stock model can be asked bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nullspace import ordinary_prompts
from ..protocols import Encoding
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


class Drawn(NamedTuple):
    """Pictures of a batch: accuracy (nan where nothing is to be seen), which equal stock's bit for bit, images."""

    accuracy: float
    same: Tensor
    images: Tensor


class Easel:
    """Draws batches and remembers the stock model's."""

    def __init__(self, host: Any, judge: Judge, suite: Suite, check: Callable[[], None]) -> None:
        self.host, self.judge, self.suite, self.check = host, judge, suite, check
        self.options = {"steps": suite.steps, "guidance": suite.guidance, "latents_only": True}
        self._stock: dict[Batch, tuple[Tensor, Tensor]] = {}

    def stock(self, batch: Batch) -> Drawn:
        latents, images = self.reference(batch)
        return Drawn(self._accuracy(images, batch), torch.ones(len(latents), dtype=torch.bool), images)

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The stock model's latents and images."""
        if batch not in self._stock:
            self.check()
            with _weighed(self.host, batch):
                latents = self.host.generate(list(batch.prompts), list(batch.seeds), **self.options)
            self._stock[batch] = latents, self.decode(latents)
        return self._stock[batch]

    def draw(self, batch: Batch, eraser: Eraser, erased: Sequence[str], gate: bool = True, **options: Any) -> Drawn:
        """Pictures with concepts erased; those equal to stock's are not decoded again."""
        self.check()
        reference, images = self.reference(batch)
        given = self.options | options
        with _weighed(self.host, batch):
            latents = eraser.generate(self.host, list(batch.prompts), list(batch.seeds), erased, gate, **given)
        same = (latents == reference).flatten(1).all(1)
        if not same.all():
            images = self.decode(latents)
        return Drawn(self._accuracy(images, batch), same, images)

    def _accuracy(self, images: Tensor, batch: Batch) -> float:
        return float(self.judge.correct(images, batch.shows).float().mean()) if batch.shows else float("nan")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.host.pipe.vae
        parts = [vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample.float().clamp(-1, 1) for x in latents.split(16)]
        return torch.cat(parts).cpu()

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
def _weighed(host: Any, batch: Batch) -> Iterator[None]:
    """The batch's prompts with its weight as ComfyUI reads weights: ``c ← c_∅ + weight · (c − c_∅)``. A negative prompt keeps 1."""
    if batch.weight == 1:
        yield
        return
    plain, empty = host.encode, host.encode([""]).context

    def encode(prompts: Sequence[str], *rest: Any) -> Encoding:
        encoding = plain(prompts, *rest)
        if len(prompts) != len(batch.prompts):
            return encoding
        return encoding._replace(context=empty + batch.weight * (encoding.context - empty))

    host.encode = encode
    try:
        yield
    finally:
        host.encode = plain
