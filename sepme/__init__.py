"""Separable multi-concept erasure for Stable Diffusion (SepME, arXiv 2402.05947).

Text decides directions (:class:`Planner`), training fills them (:func:`make_delta`), toggles weigh them (:class:`Composition`),
one projection applies them (:class:`KVProjector`).
"""

from .composition import Composition
from .concepts import Concept, ConceptBook
from .delta import ConceptDelta
from .errors import Interrupted, SepMEError
from .nullspace import Planner, PlanOptions
from .runtime import KVProjector
from .train import TrainOptions, make_delta

__all__ = [
    "Composition",
    "Concept",
    "ConceptBook",
    "ConceptDelta",
    "Interrupted",
    "KVProjector",
    "PlanOptions",
    "Planner",
    "SepMEError",
    "TrainOptions",
    "make_delta",
]
