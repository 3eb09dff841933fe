"""Which directions a concept may be edited along: ``D_i`` with ``A_i D_i = 0`` (Eq. 9-10), or as close to that as the mode allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SepMEError
from ..model.protocols import Encoding
from .directions import (
    GRAM_RTOL,
    WIDE,
    WIDEST,
    Mode,
    PlanOptions,
    RowSpace,
    Span,
    concept_basis,
    kept_energy,
    null_basis,
    null_basis_of_gram,
    soft_bases,
    stacked,
)
from .encoded_book import EncodedBook
from .pooled import Pooled, PooledFacts, plan_pooled

AUTO_WORK = 2.5e11  # N · d_in³ up to which auto tries the modes that factorise once per concept: minutes on two cores


class Found(NamedTuple):
    """D ``(d_in, k)`` float64, the share of the concept's energy along it, and the number of directions it was chosen from."""

    basis: Tensor
    energy: float
    null_dims: int


class DirectionFinder:
    """Finds each concept's directions against everything else that the book names. Results are cached per mode and concept.

    Nearby words, which nobody asked for, are given up where they leave a concept no room (and by the planner, where the gate does as well
    without them); gates are calibrated on them all the same.

    Args:
        nearby: whether they forbid directions.
    """

    def __init__(self, book: EncodedBook, options: PlanOptions, nearby: bool = True) -> None:
        self.book, self.options, self._nearby = book, options, nearby and bool(book.nearby.found.prompts)
        empty = book.empty
        self._fixed_pooled = None if empty.pooled is None else RowSpace(empty.pooled.shape[-1], empty.pooled.device, triangle=True)
        self._found: dict[tuple[Mode, str], Found] = {}
        self._span, self._fixed = self._read()

    def _read(self) -> tuple[Span, RowSpace]:
        """What forbids directions for every concept, the empty prompt and what is preserved, and what coordinates it is written in.

        Raises:
            SepMEError: too many rows for so wide an encoder; what :meth:`Preserved.read` raises.
        """
        options, book = self.options, self.book
        d_in, device = book.empty.context.shape[-1], book.empty.context.device
        triangle = options.mode in ("exact", "auto") or (options.mode == "tolerance" and options.rtol(options.mode) < GRAM_RTOL)
        room = d_in - book.row_count if d_in > WIDE else 0
        held, dense = list[Tensor](), list[RowSpace]()

        def take(encoding: Encoding, pooled: bool = True) -> None:
            nonlocal room
            if pooled and self._fixed_pooled is not None and encoding.pooled is not None:
                self._fixed_pooled.add(encoding.pooled.double())
            held.append(book.token_rows(encoding))
            room -= len(held[-1])
            if room < 0:
                if d_in > WIDEST:
                    raise SepMEError(
                        f"Prompts of this text encoder, which has {d_in} channels, may have {d_in} tokens together, and these have more; "
                        "name fewer concepts, or fewer prompts that must not change."
                    )
                if not dense:
                    dense.append(RowSpace(d_in, device, triangle))
                while held:
                    dense[0].add(held.pop(0))

        take(book.empty)
        book.preserved.read(book.encodings, take)
        for encoding in book.nearby.encodings if self._nearby else ():
            take(encoding, pooled=False)  # one row a prompt would leave no room there; the row gate spares their pooled vectors
        if dense:
            return Span(d_in), dense[0]
        span = Span.of(torch.cat([*held, *(book.rows(n) for n in book.names)]))
        fixed = RowSpace(span.dims, device, triangle)
        for rows in held:
            fixed.add(span.coordinates(rows))
        return span, fixed

    def _rows(self, name: str, which: list[bool] | None = None) -> Tensor:
        """Token rows ``(n, dims)`` of a concept, in the coordinates that are worked in."""
        return self._span.coordinates(self.book.rows(name, which))

    def _constraints(self, name: str, others: Sequence[str]) -> Iterator[Tensor]:
        """Rows of ``A_i`` that other concepts contribute."""
        carriers = self.book.carriers(name)
        return (self._rows(o, carriers.get(o)) for o in others)

    @cached_property
    def mode(self) -> Mode:
        """The mode in use; ``auto`` is the strictest that leaves room for every concept, and soft where finding out takes too long."""
        if self.options.mode != "auto":
            return self.options.mode
        names = self.book.names
        strict: tuple[Mode, ...] = ("exact", "tolerance")
        if len(names) * self._span.dims**3 > AUTO_WORK:
            strict = ()
        for mode in strict:
            if all(self.has_room(found) for found in self._find(names, mode)):
                return mode
        return "soft"

    def has_room(self, found: Found) -> bool:
        """Whether enough of the concept's energy is left outside everything else."""
        return found.basis.shape[1] > 0 and found.energy >= self.options.min_kept_energy

    def find(self, names: Sequence[str]) -> list[Found]:
        """Directions of these concepts.

        Raises:
            SepMEError: no room is left for one of them; the message says how many concepts fit.
        """
        result = []
        for name, found in zip(names, self._find(names, self.mode), strict=True):
            if not self.has_room(found):
                if not self._nearby:
                    raise SepMEError(self._refusal(name, found.energy))
                found = self._without_nearby.find([name])[0]
            result.append(found)
        return result

    def find_without_nearby(self, names: Sequence[str]) -> list[Found]:
        """Directions that nearby words do not forbid, in the same mode; none where there are no such words.

        Raises:
            SepMEError: as :meth:`find`.
        """
        return self._without_nearby.find(names) if self._nearby else []

    @cached_property
    def _without_nearby(self) -> DirectionFinder:
        return DirectionFinder(self.book, replace(self.options, mode=self.mode), nearby=False)

    def null_space(self, name: str) -> Tensor:
        """Sp ``(d_in, m)`` float64 of a concept against all others of the book (mode ``paper``).

        Raises:
            SepMEError: mode soft, which has none; or too little of the concept's energy lies in it.
        """
        if self.mode == "soft":
            raise SepMEError("Directions of mode soft are no null space; choose exact or tolerance.")
        null = self._null(name, self._others(name), self.mode)
        energy = kept_energy(self._rows(name), null)
        if energy < self.options.min_kept_energy:
            raise SepMEError(self._refusal(name, energy, basis=False))
        return self._span.channels(null)

    def pooled(self, name: str) -> tuple[Pooled | None, PooledFacts | None]:
        """Directions of the pooled vector, chosen as those of the tokens are, and what is known about them."""
        book = self.book
        own, anchor, empty = book.encodings[name].pooled, book.anchors[name].pooled, book.empty.pooled
        if own is None or anchor is None or empty is None or self._fixed_pooled is None or self._fixed_pooled.triangle is None:
            return None, None
        carriers, listed = book.carriers(name), book.preserved.listed
        known = [empty] if listed is None or listed.pooled is None else [empty, listed.pooled]
        for other in self._others(name):
            given = book.encodings[other].pooled
            if given is not None:
                known.append(given[carriers[other]] if other in carriers else given)
        rows = torch.cat(known).double()
        null = None
        if self.options.pooled == "replace":
            null = null_basis(stacked([self._fixed_pooled.triangle, rows]), self.options.rtol(self.mode))
        return plan_pooled(own, anchor, rows, null, self.options)

    def _others(self, name: str) -> list[str]:
        return [n for n in self.book.names if n != name]

    def _find(self, names: Sequence[str], mode: Mode) -> Iterator[Found]:
        """D of each of these concepts against everything else of the book."""
        book = self.book
        if mode == "soft":
            plain = [n for n in names if (mode, n) not in self._found and not book.carriers(n)]
            for group in book.groups(plain):
                book.on_progress(f"Planning ({mode})", len(self._found), len(book.names))
                self._found |= dict(zip([(mode, n) for n in group], self._soft(group, self._factor), strict=True))
        for i, name in enumerate(names):
            if (mode, name) not in self._found:
                book.on_progress(f"Planning ({mode})", i, len(names))
                self._found[mode, name] = self._one(name, self._others(name), mode)
            yield self._found[mode, name]

    def _one(self, name: str, others: Sequence[str], mode: Mode) -> Found:
        """D of one concept against the preserved rows and ``others``."""
        if mode == "soft":
            return self._soft([name], self._cholesky(self._gram(name, others)))[0]
        own, null = self._rows(name), self._null(name, others, mode)
        basis = concept_basis(own, null, self.options.max_rank, self.options.energy)
        return Found(self._span.channels(basis), kept_energy(own, basis), null.shape[1] + self._span.d_in - self._span.dims)

    def _null(self, name: str, others: Sequence[str], mode: Mode) -> Tensor:
        """Sp ``(dims, m)`` of one concept against the preserved rows and ``others``, in a mode that has one."""
        rtol, own = self.options.rtol(mode), self._rows(name)
        if rtol >= GRAM_RTOL:
            return null_basis_of_gram(self._gram(name, others) - own.T @ own, rtol)
        assert self._fixed.triangle is not None
        return null_basis(stacked([self._fixed.triangle, *self._constraints(name, others)]), rtol)

    @cached_property
    def _total(self) -> Tensor:
        """G ``(dims, dims)``: of everything that is preserved and of all concepts."""
        gram = self._fixed.gram.clone()
        for group in self.book.groups(self.book.names):
            rows = torch.cat([self._rows(n) for n in group])
            gram.addmm_(rows.T, rows)
        return gram

    def _gram(self, name: str, others: Sequence[str]) -> Tensor:
        """G of the preserved rows, the concept's own, and what ``others`` constrain it with."""
        book = self.book
        if len(others) == len(book.names) - 1:
            gram, signed = self._total.clone(), [(-1.0, self._rows(o, [not f for f in free])) for o, free in book.carriers(name).items()]
        else:
            gram, signed = self._fixed.gram.clone(), [(1.0, r) for r in (self._rows(name), *self._constraints(name, others))]
        for sign, rows in signed:
            gram.addmm_(rows.T, rows, alpha=sign)
        return gram

    def _soft(self, names: Sequence[str], factor: Tensor) -> list[Found]:
        rows = [self._rows(n) for n in names]
        bases = soft_bases(factor, rows, self.options.max_rank, self.options.energy)
        return [Found(self._span.channels(b), kept_energy(r, b), self._total_null_dims) for r, b in zip(rows, bases, strict=True)]

    def _cholesky(self, gram: Tensor) -> Tensor:
        return torch.linalg.cholesky(gram + self._epsilon * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

    @cached_property
    def _epsilon(self) -> float:
        return self.options.epsilon * float(self._total.trace()) / (self._fixed.count + self.book.row_count)

    @cached_property
    def _factor(self) -> Tensor:
        return self._cholesky(self._total)

    @cached_property
    def _total_null_dims(self) -> int:
        values = torch.linalg.eigvalsh(self._total)
        return int((values <= self.options.tolerance**2 * values[-1]).sum()) + self._span.d_in - self._span.dims

    def _refusal(self, name: str, energy: float, basis: bool = True) -> str:
        """Why there is no room and what to do; ``basis`` False where soft directions would not do (mode ``paper``)."""
        others = self._others(name)

        def fits(count: int) -> bool:
            return self.has_room(self._one(name, others[:count], self.mode))

        low, high = -1, len(others)  # fits(low), not fits(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        room = f"{low + 1} concepts fit" if low >= 0 else "not even one concept fits beside the preserve list"
        other = ", soft or auto" if basis else ""
        advice = {
            "exact": f"use mode tolerance{other}, or fewer concepts or prompts",
            "tolerance": f"raise the tolerance{', use mode soft or auto' * basis}, or use fewer concepts or prompts",
            "soft": "raise epsilon, or use fewer concepts or prompts",
        }[self.mode]
        return f"No room is left for {name!r}: {energy:.1e} of its energy is free of the others ({room} in mode {self.mode}); {advice}."
