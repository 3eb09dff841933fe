"""Concept books, encoders and options that the tests of planning share."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sepme.concepts import Concept, ConceptBook
from sepme.model.protocols import Encoding
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner

NAMES = ("star", "circle", "heart", "moon", "tree", "house")
ORDINARY = ("a cat", "big dog", "a red dog", "cat", "a blue cat on a roof", "old river")
ORDINARY += ("two birds", "the night train", "green soup", "a dog and a cat", "wind", "slow rain")
OPTIONS = PlanOptions(tolerance=0.03, max_rank=4, energy=0.999)
HALVES = (torch.float32, torch.float16, torch.bfloat16)
D_IN, TOKENS = 48, 5  # of HashedEncoder


def book_of(count: int, preserve: Sequence[str] = ()) -> ConceptBook:
    return ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in NAMES[:count]), tuple(preserve))


def stacked(encoder: Any, prompts: Sequence[str]) -> Tensor:
    return encoder.encode(prompts).context.double().flatten(0, 1)


def orthonormal_error(columns: Tensor) -> float:
    return float((columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype)).abs().max())


def angle(a: Tensor, b: Tensor) -> float:
    """Largest difference of the projectors onto two column spaces."""
    return float((a @ a.T - b @ b.T).abs().max())


class HashedEncoder:
    """Tokens that depend on the prompt and its position alone; now and then counts the rows that anyone still holds."""

    def __init__(self) -> None:
        self.mean = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1))
        self.calls = self.peak = 0

    def encode(self, prompts: Sequence[str]) -> Encoding:
        seeds = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:6], "big") for p in prompts]
        rows = torch.stack([torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(s)) for s in seeds]) + self.mean
        rows[:, 0] = self.mean[0]
        self.calls += 1
        if self.calls % 20 == 0:
            tensors = (o for o in gc.get_objects() if type(o) is Tensor and o.ndim == 3 and o.shape[2] == D_IN)
            self.peak = max(self.peak, sum(len(o) for o in tensors))
        return Encoding(rows, torch.ones(len(prompts), TOKENS, dtype=torch.bool))


def numbered_book(count: int, **more: object) -> ConceptBook:
    return ConceptBook(tuple(Concept(f"name {i}", (f"name {i}",)) for i in range(count)), **more)  # type: ignore[arg-type]


def planner_of(count: int, mode: str, **more: object) -> Planner:
    return Planner(HashedEncoder(), numbered_book(count, **more), PlanOptions(mode=mode), ordinary=("a cat", "a dog", "fog", "rain"))  # type: ignore[arg-type]
