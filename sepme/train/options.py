"""Hyper-parameters, with the defaults of each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import SEEDS, check_numbers
from ..delta.format import MAX_RANK
from ..errors import SepMEError
from ..plan.directions import MANY, PlanOptions
from .objectives import OBJECTIVES, Objective

# subspace: this project's. paper, unrestricted: arXiv 2402.05947 and its extension SRS-ME as published.
MODES: dict[str, dict[str, Any]] = {
    "subspace": {"learning_rate": 0.03, "beta": 1.0, "source": "trajectory"},
    "paper": {"learning_rate": 0.1, "beta": 1e-4, "source": "drawn"},
    "unrestricted": {"learning_rate": 1e-5, "beta": 1.0, "source": "drawn"},
}
PLANS: dict[str, dict[str, Any]] = {
    "subspace": {},
    "paper": {"mode": "exact", "max_rank": MAX_RANK, "energy": 1.0, "pooled": "leave"},
    "unrestricted": {"pooled": "leave"},
}
EDITS = {  # what a delta changes; the sum of both acts
    "layers": "keys and values of every cross-attention layer, as published",
    "context": "the text encoder's output, once, before the model reads it: one small file for every model with that encoder",
    "both": "both of them",
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
    """Hyper-parameters. The defaults are those of G-CiRs in mode subspace; :meth:`for_mode` knows those of every mode and objective.

    Attributes:
        objective: a key of :data:`~sepme.train.objectives.OBJECTIVES`.
        mode: ``subspace`` (Y along D), ``paper`` (full-width w, Eq. 9-10, compressed afterwards) or ``unrestricted`` (any ΔW).
        steps: at most so many.
        learning_rate: Adam's, on w.
        batch: draws per step.
        beta: β of Eq. 9, folded into Y.
        regularisation: λ of Eq. 11.
        regularise: ``w``: ``‖w‖_1 / M`` as in Eq. 11; ``delta``: ``‖ΔW‖_1 / M`` as in the published code.
        momentum: α of the momentum stop.
        threshold: τ of the momentum stop.
        min_steps: no stop before.
        eta_cap: largest η_i in joint training; 0: every η_i is 1.
        source: what x_t is made of: ``trajectory`` (points of the frozen model's denoising runs), ``drawn`` (noised images of the
            frozen model) or ``anchor`` (the same, drawn of the concept's anchor).
        trajectories: how many runs or images.
        guidance: η of ESD.
        warm_start: start from the closed form.
        ridge: μ of the closed form.
        values_only: leave to_k as it is.
        edit: a key of :data:`EDITS`.
        checkpoint_every: steps between checkpoints.
        seed: of every draw.

    Raises:
        SepMEError: an unknown choice, a value out of range, or options that do not go together.
    """

    objective: str = "gcirs"
    mode: str = "subspace"
    steps: int = 1000
    learning_rate: float = 0.03
    batch: int = 4
    beta: float = 1.0
    regularisation: float = 1e-6
    regularise: str = "w"
    momentum: float = 0.9
    threshold: float = 0.0
    min_steps: int = 10
    eta_cap: float = 100.0
    source: str = "trajectory"
    trajectories: int = 8
    guidance: float = 1.0
    warm_start: bool = True
    ridge: float = 1e-6
    values_only: bool = False
    checkpoint_every: int = 50
    seed: int = 0
    edit: str = "layers"

    def __post_init__(self) -> None:
        _choice("objective", self.objective, OBJECTIVES)
        _choice("mode", self.mode, MODES)
        _choice("regularisation", self.regularise, ("w", "delta"))
        _choice("source", self.source, ("trajectory", "drawn", "anchor"))
        _choice("edit", self.edit, EDITS)
        check_numbers(self, RANGES, WHOLE)
        objective = OBJECTIVES[self.objective]
        if objective.moves == "attention" and self.values_only:
            raise SepMEError(
                f"The objective {self.objective} moves attention, which values have no part in; train keys too, or choose another."
            )
        if self.edit != "layers" and self.mode != "subspace":
            raise SepMEError(f"Edits of the context lie in the concept's subspace; use mode subspace for them, not {self.mode}.")
        if self.edit != "layers" and self.values_only:
            raise SepMEError("Keys and values both read an edited context; leave out values only, or edit the layers.")
        if self.mode != "subspace" and (self.warm_start or not objective.trained):
            raise SepMEError(f"The closed form fills the concept's subspace; use it with mode subspace, not {self.mode}.")

    @staticmethod
    def for_mode(mode: str = "subspace", objective: str = "gcirs", **given: Any) -> TrainOptions:
        """The options of a mode (:data:`MODES`) and an objective; what is given and not None goes before their defaults.

        Raises:
            SepMEError: as the constructor.
            TypeError: something is given that is no option.
        """
        _choice("mode", mode, MODES)
        _choice("objective", objective, OBJECTIVES)
        defaults = MODES[mode] | {"warm_start": mode == "subspace" and OBJECTIVES[objective].warm_start}
        return TrainOptions(objective, mode, **defaults | {k: v for k, v in given.items() if v is not None})

    @property
    def protects_empty(self) -> bool:
        """Whether the empty prompt lies in A, so that no increment changes what it predicts."""
        return self.mode != "unrestricted"

    @property
    def needs_model(self) -> bool:
        """Whether a denoiser is read: a context edit in closed form is made from the text encoder alone."""
        return self.edit != "context" or OBJECTIVES[self.objective].trained

    def make_objective(self) -> Objective:
        """The objective, with these options."""
        return OBJECTIVES[self.objective](self)


def _choice(what: str, value: str, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise SepMEError(f"There is no {what} {value!r}; choose one of {', '.join(known)}.")


def plan_options(mode: str, /, concepts: int = 1, **given: Any) -> PlanOptions:
    """How directions are planned for a training mode; values that are None take the mode's default (:data:`PLANS`).

    Nearby words are looked for in mode subspace alone: the published modes are as they were published. There, books of :data:`MANY`
    ``concepts`` and more are planned in mode soft.
    """
    _choice("mode", mode, MODES)
    soft = {"mode": "soft"} if mode == "subspace" and concepts >= MANY else {}
    options = PlanOptions(**PLANS[mode] | soft | {k: v for k, v in given.items() if v is not None})
    return options if mode == "subspace" else replace(options, nearby=0)


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
