"""The usual LoRA eraser, as a baseline: both factors trained, one pair per layer, no null space, no gate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files import safetensors_bytes, write_atomically
from ..model.layers import weights
from ..model.protocols import Denoiser
from ..plan.planner import Planner
from ..train import OnStep, TrainOptions
from ..train.increment import Increment
from ..train.loop import Training
from ..train.make import make_run

DOWN = ".down"


@dataclass(frozen=True)
class LowRank(Increment):
    """``ΔW_l = U_l V_l`` with both factors in ``w``: U by projection name, V under the same name and ``.down``."""

    @staticmethod
    def start(kv: Mapping[str, Tensor], rank: int, seed: int) -> LowRank:
        """U zero, V normal with variance 1 / d_in."""
        generator = torch.Generator().manual_seed(seed)
        w = {}
        for name, weight in kv.items():
            d_out, d_in = weight.shape
            w[name] = nn.Parameter(torch.zeros(d_out, rank, device=weight.device))
            down = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            w[name + DOWN] = nn.Parameter(down.to(weight.device))
        return LowRank(None, 1.0, w)

    @property
    def names(self) -> list[str]:
        return [n for n in self.w if not n.endswith(DOWN)]

    def term(self, name: str, features: Tensor) -> Tensor:
        return features @ self.w[name + DOWN].T @ self.w[name].T

    def penalty(self, regularise: str) -> Tensor:
        return torch.stack([w.abs().sum() for w in self.w.values()]).sum() / len(self.names)


def train_lora(
    planner: Planner,
    name: str,
    denoiser: Denoiser,
    options: TrainOptions,
    rank: int,
    path: Path,
    on_step: OnStep | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """ΔW ``(d_out, d_in)`` float32 of one concept, read from ``path`` if it was made there with the same settings.

    Args:
        options: of mode unrestricted; their objective is the loss.
    """
    kv = weights(denoiser.attention_layers())
    recipe = json.dumps({"rank": rank, "train": asdict(options), "book": planner.book.dumps(), "concept": name}, sort_keys=True)
    if not _made(path, recipe):
        run = make_run(planner, name, denoiser, LowRank.start(kv, rank, options.seed), options, None, check)
        checkpoint = path.with_suffix(".checkpoint.safetensors")
        Training([run], denoiser, options).run(checkpoint, hashlib.sha256(recipe.encode()).hexdigest(), on_step)
        tensors = {n: w.detach().half().cpu().contiguous() for n, w in run.increment.w.items()}
        write_atomically(path, safetensors_bytes(tensors, {"recipe": recipe}))
        checkpoint.unlink(missing_ok=True)
    with safe_open(path, framework="pt") as file:
        return {n: file.get_tensor(n).float() @ file.get_tensor(n + DOWN).float() for n in kv}


def _made(path: Path, recipe: str) -> bool:
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("recipe") == recipe
