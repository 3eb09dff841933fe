"""Separable multi-concept erasure for Stable Diffusion (SepME, arXiv 2402.05947).

Text decides directions (:class:`Planner`), training fills them (:func:`make_delta`), toggles weigh them (:class:`Composition`),
one projection applies them (:class:`KVProjector`). A model of one's own brings a :class:`TextEncoder` and a :class:`Denoiser`
(most easily a :class:`ScheduledDenoiser`): ``examples/own_model.py``.
"""

from typing import TYPE_CHECKING, Any

from .apply.composition import Composition
from .apply.projector import KVProjector
from .concepts import Concept, ConceptBook
from .delta.concept_delta import ConceptDelta
from .errors import Interrupted, SepMEError
from .model.protocols import AttackHost, AttentionLayer, Denoiser, Encoding, EvaluationHost, ImageEncoder, TextEncoder
from .model.schedule import Schedule, ScheduledDenoiser
from .plan.directions import PlanOptions
from .plan.planner import Planner
from .train import TrainOptions, make_delta

if TYPE_CHECKING:
    from .hosts.pipeline import Erasure, erase

__all__ = [
    "AttackHost",
    "AttentionLayer",
    "Composition",
    "Concept",
    "ConceptBook",
    "ConceptDelta",
    "Denoiser",
    "Encoding",
    "Erasure",
    "EvaluationHost",
    "ImageEncoder",
    "Interrupted",
    "KVProjector",
    "PlanOptions",
    "Planner",
    "Schedule",
    "ScheduledDenoiser",
    "SepMEError",
    "TextEncoder",
    "TrainOptions",
    "erase",
    "make_delta",
]


def __getattr__(name: str) -> Any:
    """``erase`` and what it returns belong to a host, diffusers: they are loaded when they are asked for."""
    if name not in ("Erasure", "erase"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .hosts import pipeline

    return getattr(pipeline, name)
