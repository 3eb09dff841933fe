"""Where a concept may be edited: a book's prompts -> subspace D, row gate and certificate. All planning is float64.

A concept i may change keys and values only along ``D_i`` (``d_in x k``, orthonormal) with ``A_i D_i = 0``, where ``A_i``
stacks the tokens of everything else that is known (Eq. 9-10 of arXiv 2402.05947; the concept subspace is this project's).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..concepts import Concept, ConceptBook
from ..model.protocols import TextEncoder, other_texts
from ..progress import OnProgress, silent
from .calibrate import calibrate
from .directions import Mode, PlanOptions, kept_energy
from .encoded_book import EncodedBook
from .finder import DirectionFinder, Found
from .gate import Certificate
from .pooled import Pooled, PooledFacts
from .said import Said

ROOMIER = 1.3  # so much more room of the gate is worth that nearby words forbid directions, though these then carry less of the concept


@dataclass(frozen=True)
class Subspace:
    """Directions of one concept: ``down`` ``(k, d_in)`` float32, orthonormal rows (Dᵀ); gate threshold γ; certificate; pooled part."""

    concept: Concept
    down: Tensor
    gate: float
    certificate: Certificate
    options: PlanOptions = field(default_factory=PlanOptions)
    pooled: Pooled | None = None


class Planner:
    """Encodes a book's prompts once and plans a subspace for each of its concepts.

    A book's preserve file is read twice, once for D and once for the gates, a batch at a time.

    Args:
        encoder: the host's text encoder.
        book: every known concept (old and new) and what must be preserved.
        ordinary: calibration corpus; the shipped one by default.
        on_progress: called while prompts are read and concepts planned; it may raise :class:`~sepme.errors.Interrupted`.
        said, near: what is known of nearby words, see :meth:`~.nearby.Nearby.of`.

    Attributes:
        prompts: the book's token matrices, which training reads too.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        book: ConceptBook,
        options: PlanOptions | None = None,
        ordinary: Sequence[str] | None = None,
        on_progress: OnProgress = silent,
        said: Mapping[str, Said] | None = None,
        near: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.book, self.options, self._said, self._near = book, options or PlanOptions(), said, near
        self.prompts = EncodedBook(encoder, book, self.options.padding, ordinary, on_progress, self.options.nearby, said, near)
        self._finder = DirectionFinder(self.prompts, self.options)
        self._plans: dict[str, Subspace] = {}
        self._pooled: dict[str, tuple[Pooled | None, PooledFacts | None]] = {}

    def with_options(self, options: PlanOptions) -> Planner:
        """A planner of the same prompts, which are not read again; ``padding`` and ``nearby`` are as they were."""
        other = copy.copy(self)
        vars(other).pop("others", None)
        other.options, other._plans, other._pooled = options, {}, {}
        other._finder = DirectionFinder(self.prompts, options)
        return other

    @cached_property
    def others(self) -> dict[str, Planner]:
        """Of the same book in every other text that the model is given, by its name."""
        first, second = self.prompts.ordinary
        ordinary = [""] * (len(first) + len(second))
        ordinary[::2], ordinary[1::2] = first, second
        texts = other_texts(self.prompts.encoder)
        more = ordinary, self.prompts.on_progress, self._said, self._near
        return {name: Planner(encoder, self.book, self.options, *more) for name, encoder in texts.items()}

    @property
    def mode(self) -> Mode:
        """The mode in use, ``auto`` resolved."""
        return self._finder.mode

    def plan(self, name: str) -> Subspace:
        """Plan one concept's subspace against all others of the book.

        Raises:
            SepMEError: no room is left; the message says how many concepts fit.
        """
        return self.plan_all([name])[self.book[name].name]

    def plan_all(self, names: Sequence[str] | None = None) -> dict[str, Subspace]:
        """Plan several concepts (all by default) with one pass over the prompts that calibrate gates; plans are cached.

        Nearby words forbid directions where that gives the gate clearly more room; else they only calibrate it.

        Raises:
            SepMEError: no room is left for one of them; the message says how many concepts fit.
        """
        wanted = self.prompts.names if names is None else [self.book[n].name for n in names]
        todo = [n for n in dict.fromkeys(wanted) if n not in self._plans]
        if todo:
            found, freer = self._finder.find(todo), self._finder.find_without_nearby(todo)
            plans = self._calibrated([*todo, *todo[: len(freer)]], [*found, *freer])
            self._plans |= dict(zip(todo, plans, strict=False))
            for name, plan in zip(todo, plans[len(todo) :], strict=False):
                if self._plans[name].certificate.room < ROOMIER * plan.certificate.room:
                    self._plans[name] = plan
        return {n: self._plans[n] for n in wanted}

    def null_space(self, name: str) -> Tensor:
        """Sp ``(d_in, m)`` float64 of a concept against all others of the book (mode ``paper``).

        Raises:
            SepMEError: mode soft, which has none; or too little of the concept's energy lies in it.
        """
        return self._finder.null_space(self.book[name].name)

    def pooled(self, name: str) -> tuple[Pooled | None, PooledFacts | None]:
        """Directions of the pooled vector, chosen as those of the tokens are, and what is known about them."""
        name = self.book[name].name
        if name not in self._pooled:
            self._pooled[name] = self._finder.pooled(name)
        return self._pooled[name]

    def certify(self, name: str, basis: Tensor, null_dims: int, gate: float | None = None) -> Subspace:
        """The subspace spanned by a basis ``(d_in, k)``, with certificate and gate (calibrated unless given)."""
        name = self.book[name].name
        return self._calibrated([name], [Found(basis, kept_energy(self.prompts.rows(name), basis), null_dims)], gate)[0]

    def _calibrated(self, names: Sequence[str], found: Sequence[Found], gate: float | None = None) -> list[Subspace]:
        result = []
        measured = calibrate(self.prompts, names, found, self.mode, gate)
        for name, one, (own, certificate) in zip(names, found, measured, strict=True):
            pooled, facts = self.pooled(name)
            down = one.basis.T.to(torch.float32).contiguous()
            result.append(Subspace(self.book[name], down, own, replace(certificate, pooled=facts), self.options, pooled))
        return result
