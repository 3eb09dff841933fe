"""Where a concept may be edited: token matrices -> subspace D, row gate and certificate. All planning is float64.

A concept i may change keys and values only along ``D_i`` (``d_in x k``, orthonormal) with ``A_i D_i = 0``, where ``A_i``
stacks the tokens of everything else that is known (Eq. 9-10 of arXiv 2402.05947; the concept subspace is this project's).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..concepts import Concept, ConceptBook, mentions, normalised
from ..errors import SepMEError
from ..model.protocols import Encoding, TextEncoder
from ..progress import OnProgress, silent
from .directions import (
    GRAM_RTOL,
    Mode,
    PlanOptions,
    RowSpace,
    concept_basis,
    kept_energy,
    null_basis,
    null_basis_of_gram,
    soft_bases,
    stacked,
)
from .gate import Certificate, certify, extremes, ordinary_prompts, side_by_side
from .pooled import Pooled, leakage, residual
from .preserved import Preserved
from .tokens import encode, token_rows

AUTO_WORK = 2.5e11  # N · d_in³ up to which auto tries the modes that factorise once a concept: minutes on two cores
MANY = 128  # concepts from which on gates bound what half precision does instead of measuring it
GROUP_ROWS = 1 << 13  # token rows of several concepts worked on at once


@dataclass(frozen=True)
class Subspace:
    """Directions of one concept: ``down`` ``(k, d_in)`` float32, orthonormal rows (Dᵀ); gate threshold γ; certificate; pooled part."""

    concept: Concept
    down: Tensor
    gate: float
    certificate: Certificate
    options: PlanOptions = field(default_factory=PlanOptions)
    pooled: Pooled | None = None


class Found(NamedTuple):
    """D ``(d_in, k)`` float64, the share of the concept's energy along it, and the directions it was chosen from."""

    basis: Tensor
    kept: float
    null_dims: int


class Planner:
    """Encodes a book's prompts once and plans a subspace for each of its concepts.

    A book's preserve file is read twice, once for D and once for the gates, a batch at a time.

    Args:
        encoder: the host's text encoder.
        book: every known concept (old and new) and what must be preserved.
        ordinary: calibration corpus; the shipped one by default.
        on_progress: called while prompts are read and concepts planned; it may raise :class:`Interrupted`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        book: ConceptBook,
        options: PlanOptions | None = None,
        ordinary: Sequence[str] | None = None,
        on_progress: OnProgress = silent,
    ) -> None:
        self.book, self.options, self.encoder, self.on_progress = book, options or PlanOptions(), encoder, on_progress
        ordinary = ordinary_prompts() if ordinary is None else ordinary
        self.names = [c.name for c in book.concepts]
        self.empty = encode(encoder, [""])
        anchors = {a: encode(encoder, [a]) for a in dict.fromkeys(c.anchor for c in book.concepts)}
        self.anchors = {c.name: anchors[c.anchor] for c in book.concepts}
        self.encodings: dict[str, Encoding] = {}
        for i, concept in enumerate(book.concepts):
            on_progress("Reading concepts", i, len(book.concepts))
            self.encodings[concept.name] = encode(encoder, concept.prompts)
        # what gates are calibrated on, and what is held out, which verification reads too
        self._ordinary = [(half, encode(encoder, half).context if half else None) for half in (tuple(ordinary[::2]), tuple(ordinary[1::2]))]
        self._plans: dict[str, Subspace] = {}
        self._found: dict[tuple[Mode, str], Found] = {}
        mode, rtol = self.options.mode, self.options.rtol(self.options.mode)
        triangle = mode in ("exact", "auto") or (mode == "tolerance" and rtol < GRAM_RTOL)
        self._fixed = RowSpace(self.empty.context.shape[-1], self.empty.context.device, triangle)
        self._fixed.add(token_rows(self.empty, self.options.padding))
        self.preserved = Preserved(encoder, book, on_progress)
        self._fixed_pooled: RowSpace | None = None
        if self.empty.pooled is not None:
            self._fixed_pooled = RowSpace(self.empty.pooled.shape[-1], self.empty.pooled.device, triangle=True)
            self._fixed_pooled.add(self.empty.pooled.double())
        self._pooled: dict[str, tuple[Pooled | None, dict[str, Any] | None]] = {}
        self.preserved.read(self.encodings, self._keep)

    def _keep(self, encoding: Encoding) -> None:
        """Take prompts that must not change into what forbids directions."""
        self._fixed.add(token_rows(encoding, self.options.padding))
        if self._fixed_pooled is not None and encoding.pooled is not None:
            self._fixed_pooled.add(encoding.pooled.double())

    @cached_property
    def _total(self) -> Tensor:
        """G ``(d_in, d_in)``: of everything that is kept and of all concepts."""
        gram = self._fixed.gram.clone()
        for group in self._groups(self.names):
            rows = torch.cat([self._rows(n) for n in group])
            gram.addmm_(rows.T, rows)
        return gram

    def _gram(self, name: str, others: Sequence[str]) -> Tensor:
        """G of the kept rows, the concept's own, and what ``others`` constrain it with."""
        if len(others) == len(self.names) - 1:
            gram, signed = self._total.clone(), [(-1.0, self._rows(o, [not f for f in free])) for o, free in self._carriers(name).items()]
        else:
            gram, signed = self._fixed.gram.clone(), [(1.0, r) for r in (self._rows(name), *self._constraints(name, others))]
        for sign, rows in signed:
            gram.addmm_(rows.T, rows, alpha=sign)
        return gram

    @cached_property
    def _texts(self) -> dict[str, str]:
        return {c.name: "\n".join(map(normalised, c.prompts)) for c in self.book.concepts}

    def _carriers(self, name: str) -> dict[str, list[bool]]:
        """Other concepts with prompts that hold this one's words, and which of their prompts do not; the rest carry it and
        never constrain it (METHOD, section 3)."""
        words = normalised(name)
        found = {o: [not mentions(p, name) for p in self.book[o].prompts] for o, t in self._texts.items() if o != name and words in t}
        return {o: free for o, free in found.items() if not all(free)}

    def _constraints(self, name: str, others: Sequence[str]) -> Iterator[Tensor]:
        """Rows of ``A_i`` that other concepts contribute."""
        carriers = self._carriers(name)
        return (self._rows(o, carriers.get(o)) for o in others)

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Consecutive concepts whose prompts have equally many tokens, a few thousand token rows together."""
        group: list[str] = []
        rows = 0
        for name in names:
            mask = self.encodings[name].mask
            if group and (rows + mask.numel() > GROUP_ROWS or mask.shape[1] != self.encodings[group[0]].mask.shape[1]):
                yield group
                group, rows = [], 0
            group.append(name)
            rows += mask.numel()
        if group:
            yield group

    def _rows(self, name: str, which: list[bool] | None = None) -> Tensor:
        """Token rows of a concept's prompts, or of some of them."""
        encoding = self.encodings[name]
        if which is not None:
            encoding = Encoding(encoding.context[which], encoding.mask[which])
        return token_rows(encoding, self.options.padding)

    def tokens(self, name: str) -> tuple[Tensor, Tensor]:
        """Tokens C ``(n, d_in)`` of a concept's prompts and its anchor's C*, aligned by position; float64."""
        own, anchor = self.encodings[name], self.anchors[name].context
        anchor = anchor.repeat(1, own.context.shape[1] // anchor.shape[1], 1).expand_as(own.context)
        return self._rows(name), token_rows(Encoding(anchor, own.mask), self.options.padding)

    @cached_property
    def mode(self) -> Mode:
        """The mode in use; ``auto`` is the strictest that leaves room for every concept, and soft where finding out takes too long."""
        if self.options.mode != "auto":
            return self.options.mode
        strict: tuple[Mode, ...] = ("exact", "tolerance")
        if len(self.names) * self.empty.context.shape[-1] ** 3 > AUTO_WORK:
            strict = ()
        for mode in strict:
            if all(self._has_room(found) for found in self._find(self.names, mode)):
                return mode
        return "soft"

    def _has_room(self, found: Found) -> bool:
        return found.basis.shape[1] > 0 and found.kept >= self.options.min_kept_energy

    def _find(self, names: Sequence[str], mode: Mode) -> Iterator[Found]:
        """D of each of these concepts against everything else of the book."""
        if mode == "soft":
            plain = [n for n in names if (mode, n) not in self._found and not self._carriers(n)]
            for group in self._groups(plain):
                self.on_progress(f"Planning ({mode})", len(self._found), len(self.names))
                self._found |= dict(zip([(mode, n) for n in group], self._soft(group, self._factor), strict=True))
        for i, name in enumerate(names):
            if (mode, name) not in self._found:
                self.on_progress(f"Planning ({mode})", i, len(names))
                self._found[mode, name] = self._one(name, [n for n in self.names if n != name], mode)
            yield self._found[mode, name]

    def _one(self, name: str, others: Sequence[str], mode: Mode) -> Found:
        """D of one concept against the kept rows and ``others``."""
        if mode == "soft":
            return self._soft([name], self._cholesky(self._gram(name, others)))[0]
        own, null = self._rows(name), self._null(name, others, mode)
        basis = concept_basis(own, null, self.options.max_rank, self.options.energy)
        return Found(basis, kept_energy(own, basis), null.shape[1])

    def _null(self, name: str, others: Sequence[str], mode: Mode) -> Tensor:
        """Sp ``(d_in, m)`` of one concept against the kept rows and ``others``, in a mode that has one."""
        rtol, own = self.options.rtol(mode), self._rows(name)
        if rtol >= GRAM_RTOL:
            return null_basis_of_gram(self._gram(name, others) - own.T @ own, rtol)
        assert self._fixed.triangle is not None
        return null_basis(stacked([self._fixed.triangle, *self._constraints(name, others)]), rtol)

    def _soft(self, names: Sequence[str], factor: Tensor) -> list[Found]:
        rows = [self._rows(n) for n in names]
        bases = soft_bases(factor, rows, self.options.max_rank, self.options.energy)
        return [Found(b, kept_energy(r, b), self._total_null_dims) for r, b in zip(rows, bases, strict=True)]

    def _cholesky(self, gram: Tensor) -> Tensor:
        return torch.linalg.cholesky(gram + self._epsilon * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

    @cached_property
    def _epsilon(self) -> float:
        masks = [e.mask for e in self.encodings.values()]
        count = self._fixed.count + sum(m.numel() if self.options.padding == "all" else int(m.sum()) for m in masks)
        return self.options.epsilon * float(self._total.trace()) / count

    @cached_property
    def _factor(self) -> Tensor:
        return self._cholesky(self._total)

    @cached_property
    def _total_null_dims(self) -> int:
        values = torch.linalg.eigvalsh(self._total)
        return int((values <= self.options.tolerance**2 * values[-1]).sum())

    def plan(self, name: str) -> Subspace:
        """Plan one concept's subspace against all others of the book.

        Raises:
            SepMEError: no room is left; the message says how many concepts fit.
        """
        return self.plan_all([name])[self.book[name].name]

    def plan_all(self, names: Sequence[str] | None = None) -> dict[str, Subspace]:
        """Plan several concepts (all by default) with one pass over the prompts that calibrate gates; plans are kept.

        Raises:
            SepMEError: no room is left for one of them; the message says how many concepts fit.
        """
        wanted = self.names if names is None else [self.book[n].name for n in names]
        todo = [n for n in dict.fromkeys(wanted) if n not in self._plans]
        if todo:
            found = []
            for name, one in zip(todo, self._find(todo, self.mode), strict=True):
                if not self._has_room(one):
                    raise SepMEError(self._refusal(name, one.kept))
                found.append(one)
            self._plans |= self._calibrate(todo, found)
        return {n: self._plans[n] for n in wanted}

    def null_space(self, name: str) -> Tensor:
        """Sp ``(d_in, m)`` float64 of a concept against all others of the book (mode ``paper``).

        Raises:
            SepMEError: mode soft, which has none; or too little of the concept's energy lies in it.
        """
        name = self.book[name].name
        if self.mode == "soft":
            raise SepMEError("Directions of mode soft are no null space; choose exact or tolerance.")
        null = self._null(name, [n for n in self.names if n != name], self.mode)
        kept = kept_energy(self._rows(name), null)
        if kept < self.options.min_kept_energy:
            raise SepMEError(self._refusal(name, kept, basis=False))
        return null

    def pooled(self, name: str) -> tuple[Pooled | None, dict[str, Any] | None]:
        """Directions of the pooled vector, chosen as those of the tokens are, and what is known about them."""
        name = self.book[name].name
        if name not in self._pooled:
            self._pooled[name] = self._plan_pooled(name)
        return self._pooled[name]

    def _plan_pooled(self, name: str) -> tuple[Pooled | None, dict[str, Any] | None]:
        own, anchor = self.encodings[name].pooled, self.anchors[name].pooled
        if own is None or anchor is None or self._fixed_pooled is None or self._fixed_pooled.triangle is None:
            return None, None
        carriers = self._carriers(name)
        known = [self.empty.pooled, self.preserved.listed.pooled if self.preserved.listed is not None else None]
        for other in self.names:
            given = self.encodings[other].pooled
            if other != name and given is not None:
                known.append(given[carriers[other]] if other in carriers else given)
        rows = torch.cat([p for p in known if p is not None]).double()
        part = None
        if self.options.pooled == "replace":
            null = null_basis(stacked([self._fixed_pooled.triangle, rows]), self.options.rtol(self.mode))
            down = concept_basis(own.double(), null, self.options.max_rank, self.options.energy).T
            part = Pooled(down.float().contiguous(), (down @ anchor[0].double()).float()) if len(down) else None
        facts = {"mode": "left" if part is None else "replaced", "residual": residual(part, own, anchor)}
        return part, facts | ({"rank": len(part.down), "leakage": leakage(part, rows)} if part else {})

    def certify(self, name: str, basis: Tensor, null_dims: int, gate: float | None = None) -> Subspace:
        """The subspace spanned by a basis ``(d_in, k)``, with certificate and gate (calibrated unless given)."""
        name = self.book[name].name
        return self._calibrate([name], [Found(basis, kept_energy(self._rows(name), basis), null_dims)], gate)[name]

    def _refusal(self, name: str, kept: float, basis: bool = True) -> str:
        """Why there is no room and what to do; ``basis`` False where soft directions would not do (mode ``paper``)."""
        others = [n for n in self.names if n != name]

        def fits(count: int) -> bool:
            return self._has_room(self._one(name, others[:count], self.mode))

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
        return f"No room is left for {name!r}: {kept:.1e} of its energy is free of the others ({room} in mode {self.mode}); {advice}."

    def _calibrate(self, names: Sequence[str], found: Sequence[Found], gate: float | None = None) -> dict[str, Subspace]:
        """Second pass: gates (unless given) and certificates of these concepts, on all known, preserved and ordinary prompts."""
        downs = [f.basis.T.float().contiguous() for f in found]
        abreast, measured = side_by_side(downs), len(self.names) <= MANY
        worst = {"(empty prompt)": extremes(self.empty.context, abreast, measured)[0].amax(dim=0)}
        least: dict[str, Tensor] = {}  # by whose prompts, one value a planned concept
        for group in self._groups(self.names):
            self.on_progress("Gates", len(least), len(self.names))
            contexts = [self.encodings[n].context for n in group]
            most, smallest = (v.split([len(c) for c in contexts]) for v in extremes(torch.cat(contexts), abreast, measured))
            worst |= {n: v.amax(dim=0) for n, v in zip(group, most, strict=True)}
            least |= {n: v.amin(dim=0) for n, v in zip(group, smallest, strict=True)}
        for _, encoding in self.preserved.batches("Preserve file: gates"):
            values = extremes(encoding.context, abreast, measured)[0].amax(dim=0)
            worst["(preserved prompts)"] = torch.maximum(worst.get("(preserved prompts)", values), values)
        halves = [([], []) if c is None else (half, extremes(c, abreast, measured)[0].T.tolist()) for half, c in self._ordinary]
        result = {}
        table = {n: v.tolist() for n, v in worst.items()}
        for i, (name, one, down) in enumerate(zip(names, found, downs, strict=True)):
            leakage = {n: v[i] for n, v in table.items() if n != name}
            for other, free in self._carriers(name).items():
                del leakage[other]
                if any(free):
                    values = extremes(self.encodings[other].context[free], down[:, None], measured)[0]
                    leakage[other] = float(values.max())
            calibration, held_out = (
                [value for prompt, value in zip(half, values[i], strict=True) if not mentions(prompt, name)] if half else []
                for half, values in halves
            )
            high = float(least[name][i])
            own, certificate = certify(leakage, high, calibration, held_out, one.kept, len(down), one.null_dims, self.mode, gate)
            pooled, facts = self.pooled(name)
            result[name] = Subspace(self.book[name], down, own, replace(certificate, pooled=facts), self.options, pooled)
        return result
