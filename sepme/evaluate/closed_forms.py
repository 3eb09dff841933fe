"""Closed-form baselines: one solve for a whole set of concepts, nothing to toggle."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..plan.directions import null_basis
from ..plan.planner import Planner
from ..plan.tokens import token_rows
from .erasers import Changes


def _preserved(planner: Planner, erased: frozenset[str]) -> Tensor:
    """Token rows ``(n, d_in)`` float64 of the empty prompt, the preserve list and the concepts that stay."""
    listed = [planner.prompts.empty, *([planner.prompts.preserved.listed] if planner.prompts.preserved.listed is not None else [])]
    rows = [token_rows(e, planner.options.padding) for e in listed]
    return torch.cat([*rows, *(planner.prompts.tokens(n)[0] for n in planner.prompts.names if n not in erased)])


def _edited(planner: Planner, erased: frozenset[str]) -> tuple[Tensor, Tensor]:
    """C and C* ``(n, d_in)`` float64 of the concepts that go."""
    pairs = [planner.prompts.tokens(n) for n in planner.prompts.names if n in erased]
    return torch.cat([c for c, _ in pairs]), torch.cat([target for _, target in pairs])


def uce(planner: Planner, kv: Mapping[str, Tensor], ridge: float = 0.1, preserve: float = 1.0) -> Callable[[frozenset[str]], Changes]:
    """Unified Concept Editing (Gandikota et al., arXiv 2308.14761, Eq. 7): soft preservation by least squares.

    ``W' = W (Σ C*ᵀC + p Σ PᵀP + λI)(Σ CᵀC + p Σ PᵀP + λI)⁻¹``, P the tokens of what is preserved; λ = 0.1 as published.

    Args:
        kv: ``(d_out, d_in)`` by projection name.
        ridge: λ.
        preserve: p.
    """

    def changes(erased: frozenset[str]) -> Changes:
        (c, target), preserved = _edited(planner, erased), _preserved(planner, erased)
        gram = c.T @ c + preserve * preserved.T @ preserved + ridge * torch.eye(c.shape[1], dtype=c.dtype)
        move = torch.linalg.solve(gram, c.T @ (target - c)).T  # (C* − C)ᵀ C · gram⁻¹
        return {name: (weight.double().cpu() @ move).float() for name, weight in kv.items()}

    return changes


def speed(planner: Planner, kv: Mapping[str, Tensor], ridge: float = 1e-3) -> Callable[[frozenset[str]], Changes]:
    """A joint closed form like SPEED's (arXiv 2503.07392): values only, hard null space of everything that is preserved, no toggles.

    ``ΔW = W (C* − C)ᵀ C N (Nᵀ CᵀC N + μI)⁻¹ Nᵀ``, N the null basis of the preserved tokens at the planner's tolerance; SPEED's choice of
    which prompts to keep (its prior filter and augmentation) is the caller's.

    Args:
        ridge: μ relative to the mean eigenvalue of ``Nᵀ CᵀC N``.
    """

    def changes(erased: frozenset[str]) -> Changes:
        (c, target), null = _edited(planner, erased), null_basis(_preserved(planner, erased), planner.options.rtol(planner.mode))
        h = c @ null
        gram = h.T @ h
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        move = torch.linalg.solve(gram, h.T @ (target - c)).T @ null.T
        return {name: (weight.double().cpu() @ move).float() for name, weight in kv.items() if name.endswith(".to_v")}

    return changes
