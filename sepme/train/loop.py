"""The one training loop: one concept alone, or several at once (Eq. 3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import Interrupted, SepMEError, out_of_memory
from ..files import write_atomically
from ..model.protocols import Denoiser, Encoding
from .increment import Increment
from .options import OnStep, Progress, TrainOptions
from .passes import make_step
from .run import ConceptRun
from .source import Draw

MOMENTS = ("exp_avg", "exp_avg_sq")
HALF_GAIN = 1024.0  # keeps gradients inside a half-precision UNet out of its subnormals


def balance(losses: Sequence[float], cap: float) -> list[float]:
    """``η_i = (max_k L_k)² / L_i²``, at most ``cap``; 1 for the largest, and for all when cap is 0."""
    top = max(losses)
    if cap == 0:
        return [1.0] * len(losses)
    return [1.0 if loss == top else min(cap, (top / loss) ** 2) if loss else cap for loss in losses]


class Training:
    """Minimise ``Σ_i η_i L(c_i, Δθ) + λ‖W‖_p`` (Eq. 3 and 11 with L = L_cor), all runs' increments active: ``Δθ = Σ_i Δθ_i``.

    ``A_i ΔW_iᵀ = 0``, so a concept's loss has no gradient with respect to another's w: each is differentiated by its own w alone,
    with one graph in memory at a time, and then weighed by η.
    """

    def __init__(self, runs: Sequence[ConceptRun], denoiser: Denoiser, options: TrainOptions) -> None:
        self.runs, self.denoiser, self.options = runs, denoiser, options
        self.objective = options.make_objective()
        self.momentum = 0.0

    @property
    def _increments(self) -> list[Increment]:
        return [run.increment for run in self.runs]

    @property
    def step_count(self) -> int:
        """Steps done so far."""
        return max(len(r.losses) for r in self.runs)

    def settled(self, run: ConceptRun) -> bool:
        """A concept is frozen once its own momentum is ≤ τ, never in the first steps; its increment stays active."""
        return len(run.losses) >= self.options.min_steps and run.momentum <= self.options.threshold

    @property
    def done(self) -> bool:
        """``L_mom ≤ τ``, never in the first steps; or every concept frozen; or no steps left."""
        stopped = self.step_count >= self.options.min_steps and self.momentum <= self.options.threshold
        return stopped or self.step_count >= self.options.steps or all(self.settled(r) for r in self.runs)

    def step(self) -> list[ConceptRun]:
        """One step of every concept that is not frozen; returns those.

        Raises:
            SepMEError: the loss diverged.
        """
        active = [r for r in self.runs if not self.settled(r)]
        losses, gradients = zip(*(self._differentiate(r) for r in active), strict=True)
        for run, loss in zip(active, losses, strict=True):
            if not abs(loss) < 1e6:
                raise SepMEError(f"Training of {run.name!r} diverged at step {self.step_count}; lower the learning rate.")
        eta = balance(losses, self.options.eta_cap)
        for run, gradient, weight in zip(active, gradients, eta, strict=True):
            self._descend(run, gradient, weight)
        total = sum(e * loss for e, loss in zip(eta, losses, strict=True))
        self.momentum = self._smooth(self.momentum, total, first=self.step_count == 0)
        for run, loss in zip(active, losses, strict=True):
            run.momentum = self._smooth(run.momentum, loss, first=not run.losses)
            run.losses.append(loss)
        return active

    def _smooth(self, momentum: float, loss: float, first: bool) -> float:
        """``L_mom ← α L_mom + (1 − α) L``, from the first loss on."""
        alpha = self.options.momentum
        return loss if first else alpha * momentum + (1 - alpha) * loss

    def _differentiate(self, run: ConceptRun) -> tuple[float, tuple[Tensor, ...]]:
        """The loss of one draw, and its gradient with respect to the concept's own w."""
        draw = run.source.draw(run.generator, self.options.batch)
        gain = HALF_GAIN if draw.x_t.dtype == torch.float16 else 1.0
        w = list(run.increment.w.values())
        with getattr(self.denoiser, "differentiating", nullcontext)():
            loss = self.objective.loss(make_step(run, self._increments, self.denoiser, draw))
            gradients = torch.autograd.grad(loss * gain, w, allow_unused=True, materialize_grads=True)  # the last values move no attention
        return float(loss.detach()), tuple(g / gain for g in gradients)

    def predict(self, run: ConceptRun, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        """ε with all increments as they are now; shapes as in :meth:`~sepme.model.protocols.Denoiser.predict`."""
        draw = Draw(x_t, t, torch.zeros(len(x_t), dtype=torch.int64))
        step = make_step(run, self._increments, self.denoiser, draw)
        return step.erased(Encoding(context, torch.ones(context.shape[:2], dtype=torch.bool), extra))

    def _descend(self, run: ConceptRun, gradient: Sequence[Tensor], eta: float) -> None:
        w = list(run.increment.w.values())
        for parameter, g in zip(w, gradient, strict=True):
            parameter.grad = g if eta == 1 else eta * g
        if self.options.regularisation:
            (self.options.regularisation * run.increment.penalty(self.options.regularise)).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()

    def run(self, checkpoint: Path | None, digest: str, on_step: OnStep | None) -> None:
        """Train to the end, going on from a checkpoint of the same recipe; one is stored meanwhile.

        Raises:
            Interrupted: raised by ``on_step``; the state is saved first.
        """
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint, digest)
        try:
            while not self.done:
                active = self.step()
                if checkpoint is not None and self.step_count % self.options.checkpoint_every == 0:
                    self.save(checkpoint, digest)
                for run in active if on_step is not None else ():
                    figures = (run.name, self.step_count, self.options.steps, run.losses[-1], run.momentum)
                    on_step(Progress(*figures, partial(self.predict, run)))  # type: ignore[misc]
        except Interrupted:
            if checkpoint is not None and self.step_count:
                self.save(checkpoint, digest)
            raise

    def save(self, path: Path, digest: str) -> None:
        """Write w, Adam's moments, generators, losses and momenta."""
        tensors = {}
        for i, run in enumerate(self.runs):
            tensors[f"{i}.generator"] = run.generator.get_state()
            for name, w in run.increment.w.items():
                tensors[f"{i}.w.{name}"] = w.detach().cpu()
                tensors |= {f"{i}.{k}.{name}": run.optimizer.state[w][k].cpu() for k in MOMENTS}
        metadata = {
            "digest": digest,
            "momenta": json.dumps([self.momentum.hex(), *(r.momentum.hex() for r in self.runs)]),
            "losses": json.dumps([[v.hex() for v in r.losses] for r in self.runs]),
        }
        write_atomically(path, save(tensors, metadata=metadata | {"content": _content(tensors, metadata)}))

    def load(self, path: Path, digest: str) -> bool:
        """Continue from a checkpoint; False when it belongs to another recipe.

        Raises:
            SepMEError: the checkpoint is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("digest") != digest:
                    return False
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata.get("content") != _content(tensors, metadata):
                raise ValueError("content")
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise SepMEError(f"The checkpoint {path} is damaged; delete it and train again.") from None
        self.momentum, *momenta = (float.fromhex(v) for v in json.loads(metadata["momenta"]))
        losses = json.loads(metadata["losses"])
        for i, run in enumerate(self.runs):
            run.losses, run.momentum = [float.fromhex(v) for v in losses[i]], momenta[i]
            for name, w in run.increment.w.items():
                w.data.copy_(tensors[f"{i}.w.{name}"])
                moments = {k: tensors[f"{i}.{k}.{name}"].to(w.device) for k in MOMENTS}
                run.optimizer.state[w] = {"step": torch.tensor(float(len(run.losses))), **moments}
            run.generator.set_state(tensors[f"{i}.generator"])
        return True


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of a checkpoint's state."""
    digest = hashlib.sha256(f"{metadata['momenta']}\n{metadata['losses']}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
