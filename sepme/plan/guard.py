"""The guard of a delta: a gate that reads what cross-attention reads, and behind it an edit that need not be small.

A delta that leaves everything else alone acts along few directions, and prompts made to avoid these draw its concept. What draws it has to
be read by the model's layers all the same: the guard asks the context what stored image queries of the model ask it, on pictures of the
concept. It opens where the answers say so, and then gives the whole context a rank of a dozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .gate import HALVES

CHUNK = 64  # rows at once
RIDGE, MAP_RIDGE = 1e-2, 1e-3  # of the mean of the diagonal
MARGIN = 0.3  # of the room between what must stay shut and what must open


@dataclass(frozen=True, eq=False)
class Guard:
    """A gate on readouts, and a map of contexts.

    Attributes:
        queries: ``(P, d_in)`` float32, ``W_kᵀ q / √d`` of a stored image query q of one head.
        values: ``(P, d_in)`` float32, ``W_vᵀ w``, w what the answer to that query weighs.
        threshold: what :meth:`readout` exceeds where it opens.
        empty: ``(tokens, d_in)`` float32, the empty prompt.
        give, take: ``(d_in, r)`` and ``(r, d_in)`` float32, what is left of a context beside the empty prompt's.
    """

    queries: Tensor
    values: Tensor
    threshold: float
    empty: Tensor
    give: Tensor
    take: Tensor

    def readout(self, context: Tensor) -> Tensor:
        """``Σ_p softmax_t(c_t · q_p) · (c_t · v_p)`` of each row ``(rows,)`` float32 of a context ``(rows, tokens, d_in)``."""
        queries, values = self.queries.to(context.device), self.values.to(context.device)
        return torch.cat([((c @ queries.T).softmax(dim=1) * (c @ values.T)).sum(dim=(1, 2)) for c in context.float().split(CHUNK)])

    def opens(self, context: Tensor) -> Tensor:
        """Whether it opens, ``(rows,)`` bool."""
        return self.readout(context) > self.threshold

    def openness(self, context: Tensor) -> Tensor:
        """How far it is opened ``(rows,)``, differentiable by the context: 0 for the empty prompt, open above 1."""
        shut = self.readout(self.empty[None])
        return (self.readout(context) - shut) / (self.threshold - shut)

    def reduced(self, context: Tensor) -> Tensor:
        """What it leaves of contexts ``(rows, tokens, d_in)`` float32, ``c_∅ + (c − c_∅) U Vᵀ``; longer ones hold ``c_∅`` several times."""
        at = torch.arange(context.shape[1], device=context.device) % len(self.empty)
        empty = self.empty.to(context.device)[at]
        return empty + ((context - empty) @ self.give.to(context.device)) @ self.take.to(context.device)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a file."""
        return {f"guard.{f.name}": getattr(self, f.name) for f in fields(self) if f.name != "threshold"}


def both_precisions(context: Tensor) -> list[Tensor]:
    """A context as it is and as half precision rounds it."""
    return [context, *(context.to(dtype).float() for dtype in HALVES)]


def balanced_ridge(kernel: Tensor, groups: Sequence[tuple[int, float, float]]) -> Tensor:
    """Ridge regression of a target on features known by their inner products.

    Args:
        kernel: ``(n, n)`` float64, ``Φ Φᵀ``.
        groups: rows in order: how many, their target, and what all of them weigh together.

    Returns:
        α ``(n,)`` float64, so that ``w = Φᵀ α``.
    """
    target = torch.cat([torch.full((n,), y, dtype=kernel.dtype) for n, y, _ in groups])
    weight = torch.cat([torch.full((n,), total / n, dtype=kernel.dtype) for n, _, total in groups])
    weight = weight / weight.mean()
    mean = weight / weight.sum()
    centred = kernel - (mean @ kernel)[None] - (kernel @ mean)[:, None] + mean @ kernel @ mean
    root = weight.sqrt()
    system = root[:, None] * centred * root[None]
    system += RIDGE * system.diagonal().mean() * torch.eye(len(system), dtype=kernel.dtype)
    dual = root * torch.linalg.solve(system, root * (target - mean @ target))
    return dual - mean * dual.sum()  # of features that are not centred


def fit_map(parts: Mapping[str, tuple[Tensor, Tensor, float]], rank: int) -> tuple[Tensor, Tensor]:
    """Reduced-rank ridge regression of tokens on tokens, both less the empty prompt's.

    Args:
        parts: by kind, tokens ``(n, d_in)``, what is to become of them, and what all of them weigh together.

    Returns:
        U ``(d_in, rank)`` and Vᵀ ``(rank, d_in)`` float32.
    """
    d_in = next(iter(parts.values()))[0].shape[1]
    gram, cross = torch.zeros(2, d_in, d_in, dtype=torch.float64)
    for tokens, target, weight in parts.values():
        x, y = tokens.double(), target.double()
        gram += weight / len(x) * (x.T @ x)
        cross += weight / len(x) * (x.T @ y)
    gram += MAP_RIDGE * gram.diagonal().mean() * torch.eye(d_in, dtype=gram.dtype)
    solution = torch.linalg.solve(gram, cross)
    # the fitted values' second moment: its leading eigenvectors are the targets that matter
    _, vectors = torch.linalg.eigh(solution.T @ gram @ solution)
    take = vectors[:, -rank:]
    return (solution @ take).float().contiguous(), take.T.float().contiguous()
