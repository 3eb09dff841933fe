"""What every method becomes once it is made: something that erases a set of concepts on a host."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..apply.composition import Composition
from ..apply.toggles import strengths
from ..delta.concept_delta import ConceptDelta
from ..model.families import CONTEXT
from ..model.layers import projections, weight_of
from ..model.patch import Forward, patched

Changes = Mapping[str, Tensor]


class Eraser(Protocol):
    """A method, ready to use.

    Attributes:
        gated: whether it has a gate that can be switched off.
        bytes: of what has to be stored for all its concepts.
    """

    gated: bool
    bytes: int

    def generate(
        self, host: Any, prompts: Sequence[str], seeds: Sequence[int], erased: Sequence[str], gate: bool, **options: Any
    ) -> Tensor:
        """As ``host.generate``, with these concepts erased and the others as they are."""
        ...

    def acting(self, host: Any, erased: Sequence[str], gate: bool) -> AbstractContextManager[Any]:
        """The block in which the host's denoiser itself acts erased, on any context: what an attack on the text side meets.
        Gradients are to be taken inside of it."""
        ...


class Separable:
    """Deltas under toggles: this project's, whatever objective filled them."""

    gated = True

    def __init__(self, deltas: Sequence[ConceptDelta]) -> None:
        self.composition = Composition(tuple(deltas))
        self.bytes = sum(len(d.to_bytes()) for d in deltas)
        self.strength = 1.0  # of every erased concept

    def toggles(self, erased: Sequence[str]) -> dict[str, float]:
        """Strengths by concept when these are erased."""
        return {name: self.strength * (name in erased) for name in self.composition.names}

    def generate(
        self, host: Any, prompts: Sequence[str], seeds: Sequence[int], erased: Sequence[str], gate: bool, **options: Any
    ) -> Tensor:
        return host.generate(prompts, seeds, self.composition, self.toggles(erased), gate=gate, **options)

    @contextmanager
    def acting(self, host: Any, erased: Sequence[str], gate: bool) -> Iterator[None]:
        """Differentiable by the context, the gate's decision aside; the arithmetic is that of :meth:`Composition.touch` and
        :meth:`Composition.edit_context`. An edit of the context acts in ``host.predict``; per-layer deltas read what that was given."""
        table, deltas = strengths([self.toggles(erased)], self.composition.names)[0], self.composition.deltas
        layered, edits = ([i for i, d in enumerate(deltas) if acts(d)] for acts in (lambda d: d.projections, lambda d: d.edits_context))
        given: list[Tensor] = []  # the context of the pass that runs, before its edit

        def wrap(name: str, module: nn.Module, forward: Forward) -> Forward:
            def project(context: Tensor) -> Tensor:
                out = forward(context)
                return out + self._added(given[-1] if given else context, table, gate, layered, name).to(out)

            return project

        def predict(x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
            given.append(context)
            try:
                edited = context + self._added(context, table, gate, edits, CONTEXT).to(context)
                if gate:
                    edited = self.composition.guarded(edited, self.composition.weigh(context, table, gate)[1])
                return plain(x_t, t, edited, extra)
            finally:
                given.pop()

        plain, before = host.predict, vars(host).get("predict")
        with patched(projections(host.attention_layers()) if layered else {}, wrap):
            if edits:
                host.predict = predict
            try:
                yield
            finally:
                if before is not None:
                    host.predict = before
                elif edits:
                    del host.predict

    def openness(self, context: Tensor, name: str) -> Tensor:
        """How far the gate is opened, and with a guard whichever of the two is opened further ``(rows,)``; differentiable by the context
        ``(rows, tokens, d_in)``, open above 1."""
        composition, c = self.composition, context.float()
        at = composition.names.index(name)
        ratio = composition.ratios(c, c @ composition.down.T.to(c.device))[:, at] / composition.gates[at].to(c.device)
        guard = composition.deltas[at].guard
        return ratio if guard is None else torch.maximum(ratio, guard.openness(c))

    def _added(self, context: Tensor, table: Tensor, gate: bool, concepts: Sequence[int], name: str) -> Tensor:
        """``g(c) s (c D) Yᵀ`` of some deltas at a site, differentiable by ``c``."""
        composition = self.composition
        columns = torch.isin(composition.owner, torch.tensor(concepts))
        _, weight = composition.weigh(context, table, gate)
        h = (context.float() @ composition.down[columns].T.to(context.device)) * weight[:, composition.owner[columns]][:, None]
        return h @ composition.up(name, concepts).T.to(context.device)


class Merged:
    """Weights of keys and values changed for all prompts.

    Args:
        changes: ΔW ``(d_out, d_in)`` by projection name for a set of erased concepts.
    """

    gated = False

    def __init__(self, changes: Callable[[frozenset[str]], Changes], size: int) -> None:
        self.changes, self.bytes = changes, size
        self._last: tuple[frozenset[str], Changes] | None = None

    def _for(self, erased: Sequence[str]) -> Changes:
        wanted = frozenset(erased)
        if self._last is None or self._last[0] != wanted:
            self._last = wanted, self.changes(wanted) if wanted else {}
        return self._last[1]

    def generate(
        self, host: Any, prompts: Sequence[str], seeds: Sequence[int], erased: Sequence[str], gate: bool, **options: Any
    ) -> Tensor:
        with self.acting(host, erased, gate):
            return host.generate(prompts, seeds, **options)

    @contextmanager
    def acting(self, host: Any, erased: Sequence[str], gate: bool) -> Iterator[None]:
        modules = projections(host.attention_layers())
        changes = self._for(erased)
        before = {name: weight_of(modules[name]).detach().clone() for name in changes}
        try:
            with torch.no_grad():
                for name, change in changes.items():
                    weight_of(modules[name]).add_(change.to(before[name]))
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    weight_of(modules[name]).copy_(weight)


class NegativePrompt:
    """The names of the erased concepts as negative prompt."""

    gated, bytes = False, 0

    def generate(
        self, host: Any, prompts: Sequence[str], seeds: Sequence[int], erased: Sequence[str], gate: bool, **options: Any
    ) -> Tensor:
        return host.generate(prompts, seeds, negative=", ".join(erased), **options)

    def acting(self, host: Any, erased: Sequence[str], gate: bool) -> AbstractContextManager[Any]:
        return nullcontext()


class KeywordFilter:
    """The names of the erased concepts taken out of prompts before the text encoder sees them."""

    gated, bytes = False, 0

    def generate(
        self, host: Any, prompts: Sequence[str], seeds: Sequence[int], erased: Sequence[str], gate: bool, **options: Any
    ) -> Tensor:
        return host.generate([without(p, erased) for p in prompts], seeds, **options)

    def acting(self, host: Any, erased: Sequence[str], gate: bool) -> AbstractContextManager[Any]:
        return nullcontext()


def without(prompt: str, names: Sequence[str]) -> str:
    """The prompt without these names (whole words, any case); spaces closed up. Others keep their characters."""
    cleaned = prompt
    for name in sorted(names, key=len, reverse=True):
        cleaned = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", cleaned, flags=re.IGNORECASE)
    return prompt if cleaned == prompt else re.sub(r"\s+", " ", cleaned).strip(" ,")


def summed(deltas: Mapping[str, ConceptDelta], together: ConceptDelta | None = None) -> Callable[[frozenset[str]], Changes]:
    """ΔW of a set of concepts: the sum of what was trained for each by itself; of all, what was trained for all at once, if given."""

    def changes(erased: frozenset[str]) -> Changes:
        chosen = [together] if together is not None and erased == frozenset(deltas) else [deltas[n] for n in sorted(erased)]
        return {name: torch.stack([d.weight_delta(name) for d in chosen]).sum(0) for name in chosen[0].up}

    return changes
