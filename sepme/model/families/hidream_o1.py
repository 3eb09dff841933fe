"""HiDream-O1: one language model that draws; words and pixels are tokens of one sequence."""

from .family import FLOW, Family

FAMILY = Family(
    "hidream-o1",
    (),
    label="HiDream-O1",
    prediction=FLOW,
    cross_attention=False,
    marks=("t_embedder1.mlp.0 x_embedder.proj1",),
    cannot="There is no text encoder: the model reads the words themselves among the picture's tokens, so there is no context to edit.",
)
