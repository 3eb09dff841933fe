"""The deltas of a book's concepts, one after the other or jointly: the one way in which the CLI, the hosts and evaluations make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..delta.concept_delta import ConceptDelta
from ..delta.thumbnail import with_thumbnail
from ..files import remove_leftovers
from ..plan.planner import Planner
from .guard import GuardOptions, make_guard
from .make import Model, make_deltas
from .options import OnStep, TrainOptions
from .source import Pictures

if TYPE_CHECKING:
    from ..delta.thumbnail import Draw


class Group(NamedTuple):
    """Concepts that are trained jointly, and where their state is stored meanwhile, if anywhere."""

    names: tuple[str, ...]
    checkpoint: Path | None = None


def each(names: Sequence[str], checkpoint: Callable[[str], Path] | None = None) -> list[Group]:
    """Every concept by itself; ``checkpoint`` says where a concept's state is stored."""
    return [Group((name,), checkpoint(name) if checkpoint else None) for name in names]


@dataclass(frozen=True)
class Job:
    """Deltas to be made of a planner's concepts.

    Attributes:
        denoiser: the frozen model; None where the options need none. See :func:`make_deltas`.
        names: all concepts of the run. They are planned together, whichever are left to do, so that a concept's gate is calibrated in
            the same batches by whoever makes it.
        todo: what is left to do.
        pictures: by concept, the user's pictures of which x_t is made.
        draw: what draws the small picture of a finished delta; None: it gets none.
        guard: how every delta's guard is made; None: they get none.
    """

    planner: Planner
    denoiser: Model
    options: TrainOptions
    names: Sequence[str]
    todo: Sequence[Group]
    pictures: Mapping[str, Pictures] = field(default_factory=dict)
    draw: Draw | None = None
    guard: GuardOptions | None = None

    def plan(self) -> None:
        """Plan all concepts; what is planned already is not planned again."""
        if self.options.mode == "subspace":  # all gates in one pass over what calibrates them
            self.planner.plan_all(list(self.names))

    def make(self, group: Group, on_step: OnStep | None = None, check: Callable[[], None] | None = None) -> list[ConceptDelta]:
        """The deltas of a group, from its checkpoint on if there is one of the same recipe; see :func:`make_deltas`."""
        self.plan()
        made = make_deltas(self.planner, group.names, self.denoiser, self.options, group.checkpoint, on_step, self.pictures, check)
        if self.guard is not None:
            made = [make_guard(self.planner, delta, self.denoiser, self.guard, check or (lambda: None)) for delta in made]
        return made if self.draw is None else [with_thumbnail(d, self.draw) for d in made]


def train_book(
    job: Job,
    save: Callable[[ConceptDelta], object],
    on_step: OnStep | None = None,
    check: Callable[[], None] | None = None,
    on_start: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Make what a job has to do, group by group; a group's checkpoint goes once all its deltas are saved.

    Args:
        save: called with every delta as soon as it is finished.
        on_step: called after every training step; it may raise :class:`~sepme.errors.Interrupted`, which leaves a checkpoint.
        check: called between the denoising steps that x_t is taken from; it may raise Interrupted too.
        on_start: called with the names of a group before it is begun.

    Raises:
        SepMEError, Interrupted: see :func:`make_deltas`; what was saved before stays.
    """
    if job.todo:
        job.plan()
    for group in job.todo:
        if on_start is not None:
            on_start(group.names)
        if group.checkpoint is not None:
            remove_leftovers(group.checkpoint)
        for delta in job.make(group, on_step, check):
            save(delta)
        if group.checkpoint is not None:
            group.checkpoint.unlink(missing_ok=True)
