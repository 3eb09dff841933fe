"""The batches of prompts that an evaluation samples, from a suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..plan.gate import ordinary_prompts
from .suite import Suite


@dataclass(frozen=True)
class Batch:
    """Prompts sampled together.

    Attributes:
        shows: the concept that each picture should show, if any.
        weight: of the whole prompt, as in ``(a star:1.4)``.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    shows: tuple[str, ...] = ()
    weight: float = 1.0

    def first(self, count: int) -> Batch:
        """The first ``count`` of them."""
        return replace(self, prompts=self.prompts[:count], seeds=self.seeds[:count], shows=self.shows[:count])

    def split(self, size: int) -> Iterator[Batch]:
        """In pieces."""
        for i in range(0, len(self.prompts), size):
            part = slice(i, i + size)
            yield replace(self, prompts=self.prompts[part], seeds=self.seeds[part], shows=self.shows[part])


class PromptSets:
    """Prompts, seeds and labels of each condition of a suite."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite

    def own(self, name: str, unseen: bool = False, count: int | None = None) -> Batch:
        """A concept's own prompts, as many as the suite has pictures, or ``count``."""
        return self._cycled(self.suite.prompts(name, unseen), name, self.suite.names.index(name) * 1000 + (500 if unseen else 0), count)

    def weighted(self, name: str) -> Batch:
        """Its prompts with more weight."""
        return replace(self.own(name), weight=1.4)

    def _cycled(self, prompts: Sequence[str], name: str, offset: int, count: int | None = None) -> Batch:
        count = count or self.suite.images
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
