"""Hyper-parameters, with the defaults of each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import SEEDS, check_numbers
from ..delta.format import MAX_RANK
from ..errors import SepMEError
from ..plan.directions import PlanOptions
from .objectives import OBJECTIVES

# subspace: this project's. paper, unrestricted: arXiv 2402.05947 and its extension SRS-ME as published.
MODES: dict[str, dict[str, Any]] = {
    "subspace": {"learning_rate": 0.03, "beta": 1.0, "source": "trajectory", "warm_start": True},
    "paper": {"learning_rate": 0.1, "beta": 1e-4, "source": "drawn", "warm_start": False},
    "unrestricted": {"learning_rate": 1e-5, "beta": 1.0, "source": "drawn", "warm_start": False},
}
PLANS: dict[str, dict[str, Any]] = {
    "subspace": {},
    "paper": {"mode": "exact", "max_rank": MAX_RANK, "energy": 1.0, "pooled": "leave"},
    "unrestricted": {"pooled": "leave"},
}
RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 10**7),
    "learning_rate": (1e-30, 1e38),
    "batch": (1, 1 << 40),
    "beta": (1e-12, 1e6),
    "regularisation": (0, 1e6),
    "momentum": (0, 1 - 1e-9),
    "threshold": (-1e9, 1e9),
    "min_steps": (0, 10**7),
    "eta_cap": (0, 1e9),
    "trajectories": (1, 10**6),
    "guidance": (-1e3, 1e3),
    "ridge": (0, 1e9),
    "checkpoint_every": (1, 10**7),
    "seed": SEEDS,
}
WHOLE = frozenset({"steps", "batch", "min_steps", "trajectories", "checkpoint_every", "seed"})


@dataclass(frozen=True)
class TrainOptions:
    """Hyper-parameters. Those left at None take the mode's own default (:data:`MODES`).

    Attributes:
        objective: ``gcirs``, a rival's loss (``esd``, ``sdd``, ``ablation``, ``fmn``) or ``closed-form``.
        mode: ``subspace`` (Y along D), ``paper`` (full-width w, Eq. 9-10, compressed afterwards) or ``unrestricted`` (any ΔW).
        steps: at most so many. learning_rate: Adam's, on w. batch: draws a step. beta: β of Eq. 9, folded into Y.
        regularisation: λ of Eq. 11. regularise: ``w``: ``‖w‖_1 / M`` as in Eq. 11; ``delta``: ``‖ΔW‖_1 / M`` as in the published code.
        momentum: α, threshold: τ of the momentum stop. min_steps: no stop before.
        eta_cap: largest η_i in joint training; 0: every η_i is 1.
        source: what x_t is made of: ``trajectory`` (points of the frozen model's denoising runs), ``drawn`` (noised images of the
            frozen model) or ``anchor`` (the same, drawn of the concept's anchor). trajectories: how many runs or images.
        guidance: η of ESD.
        warm_start: start from the closed form (if not given: G-CiRs in mode subspace). ridge: μ of the closed form.
        values_only: leave to_k as it is.
        checkpoint_every: steps between checkpoints. seed: of every draw.

    Raises:
        SepMEError: an unknown choice, a value out of range, or options that do not go together.
    """

    objective: str = "gcirs"
    mode: str = "subspace"
    steps: int = 1000
    learning_rate: float = None  # type: ignore[assignment]
    batch: int = 4
    beta: float = None  # type: ignore[assignment]
    regularisation: float = 1e-6
    regularise: str = "w"
    momentum: float = 0.9
    threshold: float = 0.0
    min_steps: int = 10
    eta_cap: float = 100.0
    source: str = None  # type: ignore[assignment]
    trajectories: int = 8
    guidance: float = 1.0
    warm_start: bool = None  # type: ignore[assignment]
    ridge: float = 1e-6
    values_only: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("objective", self.objective, (*OBJECTIVES, "closed-form"))
        _choice("mode", self.mode, MODES)
        _choice("regularisation", self.regularise, ("w", "delta"))
        defaults = MODES[self.mode]
        if self.objective not in ("gcirs", "closed-form"):
            defaults = defaults | {"warm_start": False}
        for key, value in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        _choice("source", self.source, ("trajectory", "drawn", "anchor"))
        check_numbers(self, RANGES, WHOLE)
        if self.objective == "fmn" and self.values_only:
            raise SepMEError("Forget-Me-Not moves attention, which values have no part in; train keys too, or choose another objective.")
        if self.mode != "subspace" and (self.warm_start or self.objective == "closed-form"):
            raise SepMEError(f"The closed form fills the concept's subspace; use it with mode subspace, not {self.mode}.")


def _choice(what: str, value: str, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise SepMEError(f"There is no {what} {value!r}; choose one of {', '.join(known)}.")


def plan_options(mode: str, /, **given: Any) -> PlanOptions:
    """How directions are planned for a training mode; values that are None take the mode's default (:data:`PLANS`)."""
    _choice("mode", mode, MODES)
    return PlanOptions(**PLANS[mode] | {k: v for k, v in given.items() if v is not None})


Predict = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # as Denoiser.predict


class Progress(NamedTuple):
    """One training step of one concept as callbacks see it; ``predict`` is the model with all increments as they are now, to draw with."""

    concept: str
    step: int
    steps: int
    loss: float
    momentum: float
    predict: Predict | None = None


OnStep = Callable[[Progress], None]
