"""Several deltas as one: ``D = [D_1 .. D_N]``, ``Y_l = [Y_{1,l} .. Y_{N,l}]``, ``S = [S_1 .. S_N]``, gated and weighed per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..delta.concept_delta import ConceptDelta, check_apart
from ..errors import SepMEError
from ..model.families import CONTEXT
from ..plan.guard import Guard
from .ops import no_autocast


@dataclass(frozen=True)
class Touch:
    """What a batch of prompts meets of a composition.

    Attributes:
        rows: indices of touched rows ``(touched,)`` int64.
        h: ``gate(c D) ⊙ s`` of those rows ``(touched, tokens, R)`` float32, R the columns of ``concepts``.
        concepts: indices of the deltas that touch any row.
    """

    rows: Tensor
    h: Tensor
    concepts: tuple[int, ...]


@dataclass(frozen=True)
class Composition:
    """An immutable set of deltas of one architecture.

    Raises:
        SepMEError: two deltas of one name, or of different architectures.
    """

    deltas: tuple[ConceptDelta, ...]

    def __post_init__(self) -> None:
        check_apart(self.deltas)
        for delta in self.deltas:
            layered = next((d for d in self.deltas if d.projections), delta)
            if delta.projections:
                delta.check_fits(layered.shapes, f"the delta of {layered.concept.name!r}")
            first = self.deltas[0]
            if delta.d_in != first.d_in:
                raise SepMEError(
                    f"The deltas of {delta.concept.name!r} ({delta.d_in} channels) and {first.concept.name!r} ({first.d_in}) are for "
                    "different text encoders; load those of one model."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts, in the order of the columns of strengths."""
        return tuple(d.concept.name for d in self.deltas)

    @cached_property
    def down(self) -> Tensor:
        """``Dᵀ`` ``(R, d_in)`` float32, all concepts stacked."""
        return torch.cat([d.down for d in self.deltas])

    @cached_property
    def owner(self) -> Tensor:
        """``(R,)``: which delta a column belongs to."""
        return torch.cat([torch.full((d.rank,), i) for i, d in enumerate(self.deltas)])

    @cached_property
    def gates(self) -> Tensor:
        """``(N,)`` thresholds γ."""
        return torch.tensor([d.gate for d in self.deltas])

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Where each projection stands in :meth:`factors`; empty where all deltas are pure context edits."""
        shapes = next((d.shapes for d in self.deltas if d.projections), {})
        names = sorted(shapes)
        ends = list(accumulate((shapes[n][0] for n in names), initial=0))
        return {name: slice(a, b) for name, a, b in zip(names, ends, ends[1:], strict=False)}

    def factors(self, concepts: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Yᵀ of all projections side by side, ``(R, Σ d_out)`` float32, of the given deltas one below the other."""
        parts = []
        for i in concepts:
            half, scale = (t.to(device) for t in self.deltas[i].side_by_side)
            parts.append(half.float().mul_(scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def up(self, name: str, concepts: Sequence[int]) -> Tensor:
        """Y ``(d_out, R)`` float32 of a projection, of the given deltas side by side."""
        with no_autocast(torch.device("cpu")):
            return torch.cat([self.deltas[i].up_factor(name) for i in concepts], dim=1)

    def touch(self, context: Tensor, strengths: Tensor, gate: bool = True) -> Touch:
        """What a batch of prompts meets of the per-layer deltas (METHOD, section 7). Float32 throughout.

        Args:
            context: ``(rows, tokens, d_in)``.
            strengths: ``(rows, N)`` or ``(N,)``.
            gate: False applies the purely linear delta.

        Raises:
            SepMEError: the strengths do not fit the batch.
        """
        acting = [bool(d.projections) for d in self.deltas]
        if not any(acting):
            return Touch(torch.zeros(0, dtype=torch.int64), torch.zeros(0, context.shape[1], 0), ())
        return self._touch(*self.weigh(context, strengths, gate), acting)

    def edit_context(self, context: Tensor, strengths: Tensor, gate: bool = True) -> Tensor:
        """The context edit ``c' = c + g(c) s (c D) Sᵀ``, all deltas at once, from the context as the text encoder made it.

        Args:
            context, strengths, gate: as in :meth:`touch`.

        Returns:
            ``(rows, tokens, d_in)`` in the context's dtype: where no row is touched the context itself, else untouched rows keep
            their bits.

        Raises:
            SepMEError: the strengths do not fit the batch.
        """
        acting = [d.edits_context for d in self.deltas]
        if not any(acting):
            return context
        h, weight = self.weigh(context, strengths, gate)
        touch = self._touch(h, weight, acting)
        if len(touch.rows) == 0:
            return context
        with no_autocast(context.device):
            added = touch.h @ self.up(CONTEXT, touch.concepts).to(context.device).T
            edited = context.clone()
            edited[touch.rows] = (context[touch.rows].float() + added).to(context.dtype)
            return self.guarded(edited, weight) if gate else edited

    @cached_property
    def _guards(self) -> dict[int, Guard]:
        """By the index of their delta."""
        return {i: d.guard for i, d in enumerate(self.deltas) if d.guard is not None}

    def guarded(self, context: Tensor, weight: Tensor) -> Tensor:
        """What guards leave of an edited context, one after the other; differentiable by the context.

        Args:
            weight: strengths behind the gates ``(rows, N)``.
        """
        for i, guard in self._guards.items():
            rows = weight[:, i].nonzero().squeeze(1)
            if len(rows):
                part = context[rows].float()
                part = part + weight[rows, i][:, None, None] * (guard.reduced(part) - part)
                context = context.index_put((rows,), part.to(context.dtype))
        return context

    @cached_property
    def parts(self) -> dict[str, tuple[list[int], Composition]]:
        """By other text that the model is given beside the context: the deltas that edit it, and these edits."""
        texts = dict.fromkeys(text for delta in self.deltas for text in delta.parts)
        of = {text: [i for i, delta in enumerate(self.deltas) if text in delta.parts] for text in texts}
        return {text: (which, Composition(tuple(self.deltas[i].parts[text] for i in which))) for text, which in of.items()}

    def edit_part(self, text: str, tokens: Tensor, strengths: Tensor, gate: bool = True) -> Tensor:
        """Another text than the context ``(rows, tokens, width)``, edited as :meth:`edit_context` edits that; strengths as there."""
        which, composition = self.parts[text]
        return composition.edit_context(tokens, strengths[..., which], gate)

    def _touch(self, h: Tensor, weight: Tensor, acting: list[bool]) -> Touch:
        """What :meth:`weigh` found, of the deltas of which ``acting`` is true."""
        weight = weight * torch.tensor(acting, device=weight.device)
        owner, active = self.owner.to(h.device), weight.any(dim=0)
        rows, concepts, columns = (mask.nonzero().squeeze(1) for mask in (weight.any(dim=1), active, active[owner]))
        scale = weight.index_select(0, rows).index_select(1, owner.index_select(0, columns))
        scaled = h.index_select(0, rows).index_select(2, columns) * scale[:, None, :]
        return Touch(rows, scaled, tuple(concepts.tolist()))

    def replace_pooled(self, pooled: Tensor, context: Tensor, strengths: Tensor, gate: bool = True) -> Tensor:
        """Pooled vectors ``(rows, d_pooled)`` with the concepts' components replaced in touched rows; the others keep their bits.

        Args:
            context, strengths, gate: as in :meth:`touch`; the gate is that of the context.

        Raises:
            SepMEError: a pooled part of another width.
        """
        if not self.deltas:
            return pooled
        _, weight = self.weigh(context, strengths, gate)
        result = pooled.float().clone()
        for i, delta in enumerate(self.deltas):
            rows = weight[:, i].nonzero().squeeze(1)
            if delta.pooled is None or len(rows) == 0:
                continue
            if delta.pooled.down.shape[1] != pooled.shape[-1]:
                raise SepMEError(f"The pooled part of the delta of {delta.concept.name!r} is for another model; train it on this one.")
            result[rows] += weight[rows, i][:, None] * delta.pooled.shift(pooled[rows])
        return result.to(pooled.dtype)

    def weigh(self, context: Tensor, strengths: Tensor, gate: bool) -> tuple[Tensor, Tensor]:
        """``c D`` ``(rows, tokens, R)`` float32 and strengths behind the gate ``(rows, N)``."""
        if context.shape[-1] != self.down.shape[1]:
            raise SepMEError(f"The prompt has {context.shape[-1]} channels, the deltas {self.down.shape[1]}; they belong to another model.")
        if strengths.shape not in ((len(self.deltas),), (context.shape[0], len(self.deltas))):
            raise SepMEError(
                f"Strengths of shape {tuple(strengths.shape)} do not fit {context.shape[0]} prompts and {len(self.deltas)} deltas."
            )
        c = context.detach().float()
        with no_autocast(c.device):  # gates are calibrated in float32
            h = c @ self.down.to(c.device).T
        weight = strengths.to(c.device).expand(c.shape[0], -1).clone()
        if gate:
            opens = self.ratios(c, h) > self.gates.to(c.device)
            for i, guard in self._guards.items():
                with no_autocast(c.device):
                    opens[:, i] |= guard.opens(c)
            weight[~opens] = 0
        return h, weight

    def ratios(self, context: Tensor, h: Tensor) -> Tensor:
        """The gates' statistic ``max over tokens of ‖c D‖ / ‖c‖`` ``(rows, N)`` of a float32 context and its ``c D``."""
        energy = torch.zeros(*h.shape[:2], len(self.deltas), device=h.device)
        energy = energy.index_add(2, self.owner.to(h.device), h.square())
        root = torch.where(energy > 0, energy, 1.0).sqrt() * (energy > 0)  # which has a gradient where a token is zero
        return (root / context.norm(dim=-1, keepdim=True).clamp_min(1e-12)).amax(dim=1)
