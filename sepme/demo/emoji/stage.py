"""A resumable optimisation: what every training of the emoji world is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Stage:
    """Steps of AdamW whose rate falls in the last fifth, a checkpoint each ``every`` steps, and a seeded generator that goes into it.

    The same command goes on from the last checkpoint and ends in the same bytes as a run without a break.
    """

    def __init__(
        self,
        work: Path,
        name: str,
        modules: dict[str, nn.Module],
        steps: int,
        rate: float,
        seed: int,
        every: int = 100,
        floor: float = 0.02,
    ) -> None:
        """``modules`` are saved under their names; those that require gradients are trained."""
        self.path, self.name, self.modules, self.steps, self.every = work / f"{name}.pt", name, modules, steps, every
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.rate = rate
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint; a killed process leaves the previous one whole."""
        state: dict[str, Any] = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(), "step": self.step}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def run(self, loss_of: Callable[[int], Tensor], after: Callable[[int], None] | None = None, until: int | None = None) -> None:
        """Train to the last step (``until``: to that one). ``loss_of(step)`` draws all it needs from ``self.generator``."""
        started, used, mean = time.time(), time.process_time(), None
        last = min(self.steps, until or self.steps)
        while self.step < last:
            loss = loss_of(self.step)
            self._update(loss)
            if after:
                after(self.step)
            self.step += 1
            mean = loss.item() if mean is None else mean + 0.02 * (loss.item() - mean)
            if self.step % self.every == 0 or self.step == last:
                self.save()
                spent = f"{time.time() - started:.0f} s, {time.process_time() - used:.0f} s of processor time"
                print(f"{self.name} {self.step}/{self.steps} loss {mean:.4f}, {spent}", flush=True)

    def _update(self, loss: Tensor) -> None:
        # constant until the last fifth, so that a run can be made longer and goes on as if it had been so from the start
        left = 1 - self.step / self.steps
        factor = min(1.0, (self.step + 1) / 50) * min(1.0, 0.02 + 4.9 * left)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def pick(self, count: int, size: int) -> Tensor:
        """``size`` random integers below ``count``."""
        return torch.randint(count, (size,), generator=self.generator)


def load_stage(module: Any, work: Path, stage: str, key: str) -> Any:
    """A trained module, without gradients.

    Raises:
        SystemExit: the stage has not been run.
    """
    path = work / f"{stage}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `python -m sepme.demo.emoji {stage} --work {work}` first")
    module.load_state_dict(torch.load(path, weights_only=True, mmap=True)[key])
    return module.eval().requires_grad_(False)
