"""Separable multi-concept erasure for Stable Diffusion (SepME, arXiv 2402.05947).

Text decides directions (:class:`Planner`), training fills them (:func:`make_delta`), toggles weigh them (:class:`Composition`),
one projection applies them (:class:`KVProjector`).
"""

from .apply.composition import Composition
from .apply.projector import KVProjector
from .concepts import Concept, ConceptBook
from .delta.concept_delta import ConceptDelta
from .errors import Interrupted, SepMEError
from .hosts.pipeline import Erasure, erase
from .plan.directions import PlanOptions
from .plan.planner import Planner
from .train import TrainOptions, make_delta

__all__ = [
    "Composition",
    "Concept",
    "ConceptBook",
    "ConceptDelta",
    "Erasure",
    "Interrupted",
    "KVProjector",
    "PlanOptions",
    "Planner",
    "SepMEError",
    "TrainOptions",
    "erase",
    "make_delta",
]
