"""Where a concept may be edited: token matrices -> subspace D, row gate and certificate. All planning is float64.

A concept i may change keys and values only along ``D_i`` (``d_in x k``, orthonormal) with ``A_i D_i = 0``, where ``A_i``
stacks the tokens of everything else that is known (Eq. 9-10 of arXiv 2402.05947; the concept subspace is this project's).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .concepts import Concept, ConceptBook, mentions, normalised
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
from .errors import SepMEError
from .gate import Certificate, certify, leakage_matrix, ordinary_prompts, ratios, side_by_side, statistics
from .protocols import Encoding, TextEncoder
from .tokens import OnProgress, PreserveFile, encode, silent, token_rows

__all__ = ["Certificate", "PlanOptions", "Planner", "Subspace", "encode", "leakage_matrix", "mentions", "ordinary_prompts", "ratios"]

AUTO_WORK = 2.5e11  # N · d_in³ up to which auto tries the modes that factorise once a concept: minutes on two cores
GROUP_ROWS = 1 << 13  # token rows of several concepts worked on at once


@dataclass(frozen=True)
class Subspace:
    """Directions of one concept: ``down`` ``(k, d_in)`` float32, orthonormal rows (Dᵀ); gate threshold γ; certificate."""

    concept: Concept
    down: Tensor
    gate: float
    certificate: Certificate
    options: PlanOptions = field(default_factory=PlanOptions)


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
        self.ordinary = tuple(ordinary_prompts() if ordinary is None else ordinary)
        self.names = [c.name for c in book.concepts]
        self.empty = encode(encoder, [""])
        anchors = {a: encode(encoder, [a]) for a in dict.fromkeys(c.anchor for c in book.concepts)}
        self.anchors = {c.name: anchors[c.anchor] for c in book.concepts}
        self.encodings: dict[str, Encoding] = {}
        for i, concept in enumerate(book.concepts):
            on_progress("Reading concepts", i, len(book.concepts))
            self.encodings[concept.name] = encode(encoder, concept.prompts)
        self.preserved = encode(encoder, book.preserve) if book.preserve else None
        self.ordinary_context = encode(encoder, self.ordinary).context if self.ordinary else None
        self._plans: dict[str, Subspace] = {}
        self._found: dict[tuple[Mode, str], Found] = {}
        self._read_fixed()

    def _read_fixed(self) -> None:
        """First pass over everything that is kept: the rows it forbids, their number and digest."""
        options, empty = self.options, self.empty.context
        triangle = options.mode in ("exact", "auto") or (options.mode == "tolerance" and options.tolerance < GRAM_RTOL)
        self._fixed = RowSpace(empty.shape[-1], empty.device, triangle)
        self._fixed.add(token_rows(self.empty, options.padding))
        digest, self.preserve_count = hashlib.sha256(), 0
        own = {f: (n, p) for n, e in self.encodings.items() for f, p in zip(_fingerprints(e), self.book[n].prompts, strict=True)}
        own |= {normalised(p).encode(): (c.name, p) for c in self.book.concepts for p in c.prompts}
        for prompts, encoding in self._kept_batches("Preserve file: reading"):
            for prompt, fingerprint in zip(prompts, _fingerprints(encoding), strict=True):
                name, text = own.get(fingerprint) or own.get(normalised(prompt).encode()) or ("", "")
                if name:
                    raise SepMEError(
                        f"The prompt {text!r} of concept {name!r} reads the same to the text encoder as the preserved prompt "
                        f"{prompt!r}; it cannot be erased and kept at once, so remove one."
                    )
                digest.update(prompt.encode() + b"\n")
            self._fixed.add(token_rows(encoding, options.padding))
            self.preserve_count += len(prompts)
        self.preserve_digest = digest.hexdigest()

    def _kept_batches(self, what: str) -> Iterator[tuple[Sequence[str], Encoding]]:
        """The preserve list, then the preserve file a batch at a time."""
        if self.preserved is not None:
            yield self.book.preserve, self.preserved
        if self.book.preserve_file:
            file = PreserveFile(self.book.preserve_file)
            for prompts, done in file.batches():
                yield prompts, encode(self.encoder, prompts)
                self.on_progress(what, done, file.size)

    @cached_property
    def _total(self) -> Tensor:
        """G ``(d_in, d_in)``: of everything that is kept and of all concepts."""
        return self._gram(self.names)

    def _gram(self, names: Sequence[str]) -> Tensor:
        gram = self._fixed.gram.clone()
        for group in self._groups(names):
            rows = torch.cat([self._rows(n) for n in group])
            gram.addmm_(rows.T, rows)
        return gram

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

    def _rows(self, name: str) -> Tensor:
        return token_rows(self.encodings[name], self.options.padding)

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
            for group in self._groups([n for n in names if (mode, n) not in self._found]):
                self.on_progress(f"Planning ({mode})", len(self._found), len(self.names))
                self._found |= dict(zip([(mode, n) for n in group], self._soft(group, self._factor, self._total_null_dims), strict=True))
        for i, name in enumerate(names):
            if (mode, name) not in self._found:
                self.on_progress(f"Planning ({mode})", i, len(names))
                self._found[mode, name] = self._null(name, [n for n in self.names if n != name], mode)
            yield self._found[mode, name]

    def _null(self, name: str, others: Sequence[str], mode: Mode) -> Found:
        """D inside the null space of the kept rows and ``others``."""
        rtol, own = self.options.rtol(mode), self._rows(name)
        if rtol < GRAM_RTOL:
            assert self._fixed.triangle is not None
            null = null_basis(stacked([self._fixed.triangle, *map(self._rows, others)]), rtol)
        elif len(others) == len(self.names) - 1:
            null = null_basis_of_gram(self._total - own.T @ own, rtol)
        else:
            null = null_basis_of_gram(self._gram(others), rtol)
        basis = concept_basis(own, null, self.options.max_rank, self.options.energy)
        return Found(basis, kept_energy(own, basis), null.shape[1])

    def _soft(self, names: Sequence[str], factor: Tensor, null_dims: int) -> list[Found]:
        rows = [self._rows(n) for n in names]
        bases = soft_bases(factor, rows, self.options.max_rank, self.options.energy)
        return [Found(b, kept_energy(r, b), null_dims) for r, b in zip(rows, bases, strict=True)]

    def _cholesky(self, gram: Tensor, count: int) -> Tensor:
        epsilon = self.options.epsilon * float(gram.trace()) / count
        return torch.linalg.cholesky(gram + epsilon * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

    @cached_property
    def _factor(self) -> Tensor:
        return self._cholesky(self._total, self._count(self.names))

    def _count(self, names: Sequence[str]) -> int:
        masks = [self.encodings[n].mask for n in names]
        return self._fixed.count + sum(m.numel() if self.options.padding == "all" else int(m.sum()) for m in masks)

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
            self._calibrate(todo, found)
        return {n: self._plans[n] for n in wanted}

    def _refusal(self, name: str, kept: float) -> str:
        others = [n for n in self.names if n != name]

        def fits(count: int) -> bool:
            if self.mode != "soft":
                return self._has_room(self._null(name, others[:count], self.mode))
            known = [name, *others[:count]]
            return self._has_room(self._soft([name], self._cholesky(self._gram(known), self._count(known)), 0)[0])

        low, high = -1, len(others)  # fits(low), not fits(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        room = f"{low + 1} concepts fit" if low >= 0 else "not even one concept fits beside what is preserved"
        advice = {
            "exact": "use mode tolerance, soft or auto, or fewer concepts or prompts",
            "tolerance": "raise the tolerance, use mode soft or auto, or fewer concepts or prompts",
            "soft": "raise epsilon, or use fewer concepts or prompts",
        }[self.mode]
        return f"No room is left for {name!r}: {kept:.1e} of its energy is free of the others ({room} in mode {self.mode}); {advice}."

    def _calibrate(self, names: Sequence[str], found: Sequence[Found]) -> None:
        """Second pass: gates and certificates of these concepts, on all known, preserved and ordinary prompts."""
        downs = [f.basis.T.float().contiguous() for f in found]
        stacked_downs = side_by_side(downs)
        least: dict[str, Tensor] = {}  # by name of the prompts, one value a planned concept
        worst = {"(empty prompt)": statistics(self.empty.context, stacked_downs).amax(dim=0)}
        for group in self._groups(self.names):
            self.on_progress("Gates", len(least), len(self.names))
            contexts = [self.encodings[n].context for n in group]
            parts = statistics(torch.cat(contexts), stacked_downs).split([len(c) for c in contexts])
            for name, values in zip(group, parts, strict=True):
                worst[name], least[name] = values.amax(dim=0), values.amin(dim=0)
        for _, encoding in self._kept_batches("Preserve file: gates"):
            values = statistics(encoding.context, stacked_downs).amax(dim=0)
            worst["(preserved prompts)"] = torch.maximum(worst.get("(preserved prompts)", values), values)
        ordinary = torch.zeros(0, len(downs)) if self.ordinary_context is None else statistics(self.ordinary_context, stacked_downs)
        table = {n: v.tolist() for n, v in worst.items()}
        for i, (name, one, down) in enumerate(zip(names, found, downs, strict=True)):
            # the name of one concept in another's: those prompts carry this concept too
            leakage = {n: v[i] for n, v in table.items() if n != name and not (n in self.encodings and mentions(n, name))}
            strangers = [not mentions(p, name) for p in self.ordinary]
            values = ordinary[:, i].cpu()[torch.tensor(strangers, dtype=torch.bool)]
            gate, certificate = certify(leakage, least[name][i], values[0::2], values[1::2], one.kept, len(down), one.null_dims, self.mode)
            self._plans[name] = Subspace(self.book[name], down, gate, certificate, self.options)


def _fingerprints(encoding: Encoding) -> list[bytes]:
    """A hash of each row of the context, for finding prompts that read the same to the encoder."""
    rows = encoding.context.detach().cpu().contiguous().flatten(1).view(torch.uint8)
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in rows]
