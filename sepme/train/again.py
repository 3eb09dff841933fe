"""A delta made again, by the recipe that its file holds, with more that must not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..concepts import ConceptBook, normalised
from ..delta.concept_delta import ConceptDelta
from ..delta.facts import DAMAGE
from ..errors import SepMEError
from ..model.protocols import Denoiser, TextEncoder
from ..plan.nearby import COUNT, HELD_OUT, PLAIN
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from .make import make_delta
from .options import OnStep, TrainOptions, plan_options


def made_again(
    encoder: TextEncoder,
    denoiser: Denoiser | None,
    delta: ConceptDelta,
    words: Sequence[str],
    on_progress: OnProgress = silent,
    on_step: OnStep | None = None,
    check: Callable[[], None] | None = None,
) -> ConceptDelta:
    """The delta by itself, as its recipe says, with these words in several phrases on its preserve list and nearby words preserved.

    Raises:
        SepMEError: the file holds no such recipe (imported, reprojected, of pictures or of another version), or what
            :func:`make_delta` raises.
    """
    recipe, name = delta.recipe, delta.concept.name
    again = f"it cannot be made again from its file alone; train {name!r} with these words on its preserve list: {', '.join(words)}."
    if delta.guard is not None:
        raise SepMEError(f"The delta of {name!r} has a guard, so {again}")
    if {"import", "reproject", "pictures"} & set(recipe.data):
        raise SepMEError(f"The delta of {name!r} was made of another file or of pictures, so {again}")
    try:
        book, options = ConceptBook.parse(recipe.book), TrainOptions(**recipe.train)
        plan = plan_options(options.mode, **dict(recipe.plan))
    except (SepMEError, *DAMAGE):
        raise SepMEError(f"The delta of {name!r} holds no recipe that this version can follow, so {again}") from None
    own = {normalised(p) for c in book.concepts for p in c.prompts}
    more = [text for word in words for text in (word, *(t.format(word) for t in (*PLAIN, *HELD_OUT))) if normalised(text) not in own]
    book = replace(book, preserve=tuple(dict.fromkeys((*book.preserve, *more))))
    plan = replace(plan, nearby=max(plan.nearby, COUNT) if options.mode == "subspace" else 0)
    planner = Planner(encoder, book, plan, on_progress=on_progress, said={name: delta.facts.nearby.said})
    return make_delta(planner, name, denoiser if options.needs_model else None, options, on_step=on_step, check=check)
