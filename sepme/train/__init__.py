"""Training fills the directions that text decided: options, where x_t comes from, increments, one loop, the deltas of a book."""

from .book import Job, each, train_book
from .make import make_delta, make_deltas
from .options import OnStep, Progress, TrainOptions, plan_options
from .source import Pictures

__all__ = ["Job", "OnStep", "Pictures", "Progress", "TrainOptions", "each", "make_delta", "make_deltas", "plan_options", "train_book"]
