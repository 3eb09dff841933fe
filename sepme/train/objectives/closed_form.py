"""Up-factors in one solve: least squares of ``c (W + ΔW)ᵀ -> C* Wᵀ`` along the allowed directions (METHOD, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...delta.concept_delta import ConceptDelta
from ...model.families import CONTEXT
from .objective import Objective, Read


class ClosedForm(Objective):
    """The increment whose keys and values are nearest the anchor's, by :func:`solve`; nothing is trained."""

    name = "closed-form"
    summary = "solved in seconds, the anchor takes the concept's place"
    trained, warm_start = False, True

    def solve(
        self, weights: Mapping[str, Tensor], tokens: Tensor, target: Tensor, down: Tensor, read: Read | None = None
    ) -> dict[str, Tensor]:
        return solve(weights, tokens, target, down, self.options.ridge, self.options.values_only, read)


def solve(
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    target: Tensor,
    down: Tensor,
    ridge: float = 1e-6,
    values_only: bool = False,
    read: Read | None = None,
) -> dict[str, Tensor]:
    """``Y_l = W_l (C* − C)ᵀ H (HᵀH + μI)⁻¹`` with ``H = C D``.

    Args:
        weights: ``(d_out, d_in)`` by projection name (``<layer>.to_k`` / ``.to_v``).
        tokens: ``C`` ``(n, d_in)``, the concept's tokens.
        target: ``C*`` ``(n, d_in)``, the anchor's, aligned by position.
        down: ``Dᵀ`` ``(k, d_in)``.
        ridge: μ relative to the mean eigenvalue of ``HᵀH``.
        values_only: leave to_k as it is.
        read: what the layers read of tokens, where that is not the tokens themselves: ``E*`` and ``E`` take the place of ``C*`` and ``C``
            in the difference, and H stays.

    Returns:
        Y ``(d_out, k)`` by projection name, float32; float64 where the weights are.
    """
    return up_factors(weights, [shift(tokens, target, down, ridge, read)], values_only)[0]


def shift(tokens: Tensor, target: Tensor, down: Tensor, ridge: float = 1e-6, read: Read | None = None) -> Tensor:
    """``(C* − C)ᵀ H (HᵀH + μI)⁻¹`` ``(d_in, k)`` float64: what a concept asks of every layer; arguments as for :func:`solve`."""
    c, d = tokens.double(), down.double().T
    h = c @ d
    gram = h.T @ h
    mu = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + mu * eye, h.T @ _gap(target, tokens, read).double().to(h.device)).T


def up_factors(weights: Mapping[str, Tensor], shifts: Sequence[Tensor], values_only: bool = False) -> list[dict[str, Tensor]]:
    """``Y_l = W_l S`` of many concepts, one dictionary each: one matrix product per layer for all of them."""
    ranks = [s.shape[1] for s in shifts]
    stacked = torch.cat(list(shifts), dim=1)
    result: list[dict[str, Tensor]] = [{} for _ in shifts]
    for name, weight in weights.items():
        if values_only and name.endswith(".to_k"):
            y = torch.zeros(weight.shape[0], sum(ranks))
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            y = stacked.to(dtype).to(weight.device)
            y = y if name == CONTEXT else weight.to(dtype) @ y
        for one, part in zip(result, y.split(ranks, dim=1), strict=True):
            one[name] = part.contiguous()
    return result


def distance(weights: Mapping[str, Tensor], tokens: Tensor, target: Tensor, delta: ConceptDelta, read: Read | None = None) -> float:
    """``‖C (W + ΔW)ᵀ − C* Wᵀ‖ / ‖C Wᵀ − C* Wᵀ‖`` over all layers: how far keys and values still are from the anchor's, 1 without delta.

    Args:
        weights, tokens, target, read: as for :func:`solve`.
    """
    moved, given = tokens.float() @ delta.down.T, _gap(tokens, target, read).float().cpu()
    before = after = 0.0
    for name, weight in weights.items():
        gap = given if name == CONTEXT else given @ weight.detach().float().cpu().T
        before += float(gap.square().sum())
        after += float((gap + moved @ delta.up_factor(name).T).square().sum())
    return (after / before) ** 0.5 if before else 0.0


def _gap(a: Tensor, b: Tensor, read: Read | None) -> Tensor:
    """The difference of what layers read of two lists of tokens ``(n, d_in)``."""
    return a.double() - b.double() if read is None else read(a) - read(b)
