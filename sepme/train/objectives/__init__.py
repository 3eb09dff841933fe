"""Training objectives: one file, one class, one equation each. README.md says how to add one."""

from __future__ import annotations

from .ablation import Ablation
from .closed_form import ClosedForm
from .esd import ESD
from .fmn import FMN
from .gcirs import GCiRs
from .objective import Objective, Step
from .sdd import SDD

__all__ = ["OBJECTIVES", "Objective", "Step", "described"]

# in the order of every menu
OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in (GCiRs, ESD, SDD, Ablation, FMN, ClosedForm)}


def described() -> str:
    """All objectives in one line for help and tooltips: ``name: summary.``"""
    return " ".join(f"{o.name}: {o.summary}." for o in OBJECTIVES.values())
