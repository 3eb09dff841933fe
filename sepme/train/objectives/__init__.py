"""Training objectives: one file, one class, one equation each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .ablation import Ablation
from .esd import ESD
from .fmn import FMN
from .gcirs import GCiRs
from .sdd import SDD
from .step import Objective, Step

__all__ = ["OBJECTIVES", "Objective", "Step"]

# made from TrainOptions; where the empty prompt lies in A it is protected
OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "gcirs": lambda options: GCiRs(protected=options.mode != "unrestricted"),
    "esd": lambda options: ESD(options.guidance),
    "sdd": lambda options: SDD(protected=options.mode != "unrestricted"),
    "ablation": lambda options: Ablation(),
    "fmn": lambda options: FMN(),
}
