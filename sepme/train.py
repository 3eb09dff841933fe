"""Make a concept's delta: G-CiRs in the concept's own subspace, or the closed form. One model, one copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .closed_form import solve
from .delta import ConceptDelta, write_atomically
from .errors import Interrupted, SepMEError
from .layers import kv_fingerprint, projections, weights
from .nullspace import Planner, Subspace
from .objectives import OBJECTIVES
from .protocols import Denoiser, Encoding
from .runtime import Forward, patched


@dataclass(frozen=True)
class TrainOptions:
    """Hyper-parameters.

    Attributes:
        objective: ``gcirs`` or ``closed-form``.
        steps: at most so many. learning_rate: Adam's, on Y. batch: draws a step. beta: β of Eq. 9, folded into Y.
        regularisation: λ of Eq. 11 on ``‖w‖_1 / M``. momentum: α, threshold: τ of the momentum stop. min_steps: no stop before.
        trajectories: runs of the frozen model from which ``x_t`` is drawn.
        warm_start: start from the closed form. ridge: μ of the closed form. values_only: leave to_k as it is.
        checkpoint_every: steps between checkpoints. seed: of every draw.
    """

    objective: str = "gcirs"
    steps: int = 1000
    learning_rate: float = 0.03
    batch: int = 4
    beta: float = 1.0
    regularisation: float = 1e-6
    momentum: float = 0.9
    threshold: float = 0.0
    min_steps: int = 10
    trajectories: int = 8
    warm_start: bool = False
    ridge: float = 1e-6
    values_only: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in (*OBJECTIVES, "closed-form"):
            raise SepMEError(f"There is no objective {self.objective!r}; choose one of {', '.join((*OBJECTIVES, 'closed-form'))}.")
        positive = (self.steps, self.learning_rate, self.batch, self.beta, self.trajectories, self.checkpoint_every)
        if not all(v > 0 for v in positive) or not 0 <= self.momentum < 1:
            raise SepMEError(
                "steps, learning rate, batch, beta, trajectories and checkpoint interval must be above 0, and momentum in [0, 1)."
            )


class Progress(NamedTuple):
    """One training step as callbacks see it."""

    concept: str
    step: int
    steps: int
    loss: float
    momentum: float


OnStep = Callable[[Progress], None]


@dataclass
class _State:
    """What a checkpoint holds: Y and Adam's moments by projection name, generator, losses."""

    up: dict[str, nn.Parameter]
    optimizer: torch.optim.Adam
    generator: torch.Generator
    losses: list[float]
    momentum: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)

    def save(self, path: Path, digest: str) -> None:
        tensors = {"generator": self.generator.get_state()}
        for name, y in self.up.items():
            moments = self.optimizer.state.get(y, {})
            tensors |= {f"y.{name}": y.detach().cpu()}
            tensors |= {f"{k}.{name}": moments[k].cpu() for k in ("exp_avg", "exp_avg_sq") if k in moments}
        metadata = {"digest": digest, "momentum": self.momentum.hex(), "losses": json.dumps([v.hex() for v in self.losses])}
        write_atomically(path, save(tensors, metadata=metadata))

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
                losses = [float.fromhex(v) for v in json.loads(metadata["losses"])]
                for name, y in self.up.items():
                    y.data.copy_(file.get_tensor(f"y.{name}"))
                    moments = {k: file.get_tensor(f"{k}.{name}").to(y.device) for k in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[y] = {"step": torch.tensor(float(len(losses))), **moments}
                self.generator.set_state(file.get_tensor("generator"))
                self.losses, self.momentum = losses, float.fromhex(metadata["momentum"])
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError):
            raise SepMEError(f"The checkpoint {path} is damaged; delete it and train again.") from None
        return True


def recipe_of(planner: Planner, subspace: Subspace, options: TrainOptions, fingerprint: str) -> dict[str, Any]:
    """All that is needed to make the file again on the same machine."""
    return {
        "book": json.loads(planner.book.dumps()),
        "concept": subspace.concept.name,
        "plan": asdict(subspace.options),
        "train": asdict(options),
        "kv_fingerprint": fingerprint,
        "threads": torch.get_num_threads(),
    }


def make_delta(
    planner: Planner,
    name: str,
    denoiser: Denoiser,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
) -> ConceptDelta:
    """Plan a concept's subspace and fill it.

    Args:
        planner: holds the book and its tokens. name: the concept. denoiser: the frozen model.
        checkpoint: where training state is kept meanwhile; training goes on from it when it is there and of the same recipe.
            The caller deletes it once the delta is saved.
        on_step: called after every step; it may raise :class:`Interrupted`, which stops training after a checkpoint.

    Returns:
        the delta, with certificate, recipe and ``losses`` in its info.

    Raises:
        SepMEError: no room in the null space, or training diverged.
        Interrupted: raised by ``on_step``.
    """
    options = options or TrainOptions()
    subspace = planner.plan(name)
    layers = denoiser.attention_layers()
    fingerprint = kv_fingerprint(layers)
    recipe = recipe_of(planner, subspace, options, fingerprint)
    if options.objective == "closed-form" or options.warm_start:
        tokens, target = planner.tokens(subspace.concept.name)
        start = solve(weights(layers), tokens, target, subspace.down, options.ridge, options.values_only)
    else:
        start = {n: torch.zeros(w.shape[0], len(subspace.down)) for n, w in weights(layers).items()}
    losses: list[float] = []
    if options.objective == "closed-form":
        up: Mapping[str, Tensor] = start
    else:
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        up, losses = _train(planner, subspace, denoiser, options, start, checkpoint, digest, on_step)
    known = [{"name": c.name, "prompts": c.prompts} for c in planner.book.concepts if c is not subspace.concept]
    preserve = planner.book.preserve
    digest = hashlib.sha256("\n".join(preserve).encode()).hexdigest()
    info = {
        "known": known,
        "preserve": {"count": len(preserve), "sha256": digest} | ({"prompts": preserve} if len(preserve) <= 100 else {}),
        "objective": {"name": options.objective, "steps": len(losses)} | asdict(options),
        "recipe": recipe,
        "kv_fingerprint": fingerprint,
        "clip_skip": 0,
        "certificate": subspace.certificate.to_json(),
        "losses": [round(v, 8) for v in losses],
    }
    return ConceptDelta.from_factors(subspace.concept, subspace.down, up, subspace.gate, info, subspace.pooled)


def _train(
    planner: Planner,
    subspace: Subspace,
    denoiser: Denoiser,
    options: TrainOptions,
    start: Mapping[str, Tensor],
    checkpoint: Path | None,
    digest: str,
    on_step: OnStep | None,
) -> tuple[dict[str, Tensor], list[float]]:
    modules = projections(denoiser.attention_layers())
    device = next(iter(weights(denoiser.attention_layers()).values())).device
    own = planner.encodings[subspace.concept.name].to(device)
    repeat = own.context.shape[1] // planner.empty.context.shape[1]
    nothing = Encoding(planner.empty.context.repeat(1, repeat, 1), planner.empty.mask.repeat(1, repeat), planner.empty.pooled).to(device)
    up = {n: nn.Parameter((start[n] / options.beta).to(device)) for n in modules if not (options.values_only and n.endswith("to_k"))}
    optimizer = torch.optim.Adam(up.values(), lr=options.learning_rate)
    state = _State(up, optimizer, torch.Generator().manual_seed(options.seed), [])
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, digest)

    draws = torch.Generator().manual_seed(options.seed + 1)
    runs = torch.randint(len(own.context), (options.trajectories,), generator=draws)
    some, empty = own.rows(runs), nothing.rows([0] * len(runs))
    extra = () if some.pooled is None or empty.pooled is None else (torch.cat([empty.pooled, some.pooled]),)
    with torch.no_grad():
        points, times = denoiser.trajectory(some.context, empty.context, draws, *extra)
    objective = OBJECTIVES[options.objective]()
    down = subspace.down.to(device)
    gain = 1024.0 if points.dtype == torch.float16 else 1.0  # keeps gradients inside a half-precision UNet out of its subnormals
    h = torch.empty(0)

    def wrap(name: str, module: nn.Module, forward: Forward) -> Forward:
        return lambda context: forward(context) + (h @ (options.beta * up[name]).T).to(context.dtype)

    def step() -> float:
        nonlocal h
        run = torch.randint(len(runs), (options.batch,), generator=state.generator)
        at = torch.randint(len(times), (options.batch,), generator=state.generator)
        x_t, t, prompts = points[at, run], times[at], own.rows(runs[run])
        h = prompts.context.float() @ down.T

        def frozen(c: Encoding) -> Tensor:
            with torch.no_grad():
                return denoiser.predict(x_t, t, c.context, c.pooled).float()

        def erased(c: Encoding) -> Tensor:
            pooled = c.pooled if c.pooled is None or subspace.pooled is None else subspace.pooled.replace(c.pooled)
            with patched({n: modules[n] for n in up}, wrap):
                return denoiser.predict(x_t, t, c.context, pooled).float()

        loss = objective.loss(frozen, erased, prompts, nothing.rows([0] * len(at)))
        norm = sum((y.abs().sum() for y in up.values()), torch.zeros((), device=device)) / len(up)
        optimizer.zero_grad()
        ((loss + options.regularisation * norm) * gain).backward()
        for y in up.values():
            y.grad = None if y.grad is None else y.grad / gain
        optimizer.step()
        return float(loss.detach())

    try:
        while state.step < options.steps and not _converged(state, options):
            loss = step()
            if not abs(loss) < 1e6:
                raise SepMEError(f"Training of {subspace.concept.name!r} diverged at step {state.step}; lower the learning rate.")
            state.momentum = options.momentum * state.momentum + (1 - options.momentum) * loss if state.losses else loss
            state.losses.append(loss)
            if checkpoint is not None and state.step % options.checkpoint_every == 0:
                state.save(checkpoint, digest)
            if on_step is not None:
                on_step(Progress(subspace.concept.name, state.step, options.steps, loss, state.momentum))
    except Interrupted:
        if checkpoint is not None and state.step:
            state.save(checkpoint, digest)
        raise
    result = {n: options.beta * up[n].detach() if n in up else start[n] for n in modules}
    return result, state.losses


def _converged(state: _State, options: TrainOptions) -> bool:
    """``L_mom ≤ τ``, never in the first steps."""
    return state.step >= options.min_steps and state.momentum <= options.threshold
