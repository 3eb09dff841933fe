"""Training fills the directions that text decided: options, where x_t comes from, increments, one loop, the deltas."""

from .make import make_delta, make_deltas
from .options import OnStep, Progress, TrainOptions, plan_options
from .source import Pictures

__all__ = ["OnStep", "Pictures", "Progress", "TrainOptions", "make_delta", "make_deltas", "plan_options"]
