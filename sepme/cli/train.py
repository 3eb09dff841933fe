"""``sepme train``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..concepts import ConceptBook, file_name
from ..delta.concept_delta import ConceptDelta
from ..delta.format import check_replaceable
from ..errors import Interrupted, SepMEError
from ..files import check_writable, remove_leftovers, write_atomically
from .common import finish, interruptible, log, progress, progress_bar
from .inspect import show_summaries, summary
from .options import Hyperparameters, Json, ModelOptions, NullSpace, OutFolder, Preserve, Size, grouped

if TYPE_CHECKING:
    from ..delta.thumbnail import Draw
    from ..model.protocols import ImageEncoder
    from ..train.book import Group
    from ..train.workers import Setup


@grouped
def train(
    model: ModelOptions,
    book: Annotated[Path, typer.Argument(help="The list: names, with prompts if they say more than the name (YAML or JSON).")],
    out: OutFolder,
    parameters: Hyperparameters,
    space: NullSpace,
    joint: Annotated[bool, typer.Option("--joint", help="Train the concepts together, balanced, not one by one.")] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures to noise (a subfolder named as a concept's file goes before the folder itself).")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train only these concepts of the book.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from checkpoints, skip finished concepts.")] = False,
    preserve: Preserve = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of the concept that the rank must carry, cap allowing (0.9; in mode paper 1, of the delta)."),
    ] = None,
    pooled: Annotated[
        str | None, typer.Option(help="SDXL's pooled text vector along the concept: replace or leave; by default replace in mode subspace.")
    ] = None,
    guard: Annotated[
        bool,
        typer.Option(
            "--guard",
            help="For who serves others: a second gate that prompts made to get past the first find harder, and a stronger edit behind it. "
            "Minutes per concept, with --edit context. It is no proof.",
        ),
    ] = False,
    size: Size = None,
    workers: Annotated[int, typer.Option(help="Processes that train concepts side by side, through Ray; 0: this one.", min=0)] = 0,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster for --workers; without it they run on this machine.")] = None,
    thumbnail: Annotated[
        bool,
        typer.Option(
            help="Draw a small picture into each file: the concept's first prompt, unchanged and erased. Large models need a GPU."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Make files that erase, one per concept of a list."""
    import torch

    from ..train.guard import GuardOptions
    from ..train.workers import Setup, no_drawing

    concept_book = ConceptBook.load(book)
    if preserve is not None:
        concept_book = replace(concept_book, preserve_file=str(preserve))
    chosen = list(dict.fromkeys(concept_book[n].name for n in only)) if only else [c.name for c in concept_book.concepts]
    plan = space.plan(parameters.mode, concepts=len(concept_book.concepts), energy=energy, pooled=pooled)
    options = parameters.options()
    paths = {name: out / f"{file_name(name)}.safetensors" for name in chosen}
    if len(set(paths.values())) < len(paths):
        raise SepMEError("Two concepts of the book differ in hyphens alone and would get the same file name; rename one.")
    for name, path in paths.items():
        check_replaceable(path, name)
    if guard and (options.edit != "context" or plan.nearby == 0):
        raise SepMEError("A guard belongs to an edit of the context that looks at nearby words; add --edit context, keep --nearby.")
    if workers and joint:
        raise SepMEError("Joint training is one piece of work; leave out --joint or --workers.")
    check_writable(out)
    for inner, outer in concept_book.overlaps():
        log.print(f"Note: the words of {inner!r} stand in {outer!r}; erasing one will touch prompts of the other.")
    pictures = partial(_pictures, folder=images, names=chosen)
    load, threads = partial(model.load, size, not options.needs_model and not guard, not guard), torch.get_num_threads()
    draw, made = _draw if thumbnail else no_drawing, GuardOptions() if guard else None
    setup = Setup(load, concept_book, plan, options, tuple(chosen), threads, pictures, draw, made)
    _make(setup, _left(out.resolve(), paths, joint, resume), paths, workers, ray_address, tell_mode=space.null_space == "auto")
    results = [summary(ConceptDelta.load(paths[n]), paths[n]) for n in chosen]
    finish({"deltas": results}, as_json, lambda: show_summaries(results))


def _left(folder: Path, paths: Mapping[str, Path], joint: bool, resume: bool) -> list[Group]:
    """What is left to do: everything, or with ``resume`` what has no file yet. Leftovers go, and without ``resume`` checkpoints too."""
    from ..train.book import Group

    groups = [tuple(paths)] if joint else [(name,) for name in paths]
    todo = []
    for names in groups:
        checkpoint, files = folder / f"{file_name(' + '.join(names))}.checkpoint.safetensors", [paths[n] for n in names]
        for path in (checkpoint, *files):
            remove_leftovers(path)
        if not resume:
            checkpoint.unlink(missing_ok=True)
        if resume and all(path.exists() for path in files) and not checkpoint.exists():
            for name, path in zip(names, files, strict=True):
                log.print(f"{name}: already made ({path})")
        else:
            todo.append(Group(names, checkpoint))
    return todo


def _make(
    setup: Setup, todo: Sequence[Group], paths: Mapping[str, Path], workers: int, address: str | None, tell_mode: bool
) -> None:  # fmt: skip
    """Make what is left, here or on workers, with a progress bar per concept."""
    from ..train import Progress, train_book
    from ..train.workers import train_on_workers

    total = setup.options.steps
    with interruptible() as check, progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def begin(names: Sequence[str]) -> None:
            tasks.update({name: bar.add_task(name, total=total, loss="") for name in names})

        def show(step: Progress) -> None:
            bar.update(tasks[step.concept], completed=step.step, loss=f"loss {step.loss:.5f}")

        def on_step(step: Progress) -> None:
            show(step)
            check()

        def save(delta: ConceptDelta) -> None:
            name = delta.concept.name
            check_replaceable(paths[name], name)  # time has passed
            delta.save(paths[name])
            bar.update(tasks[name], completed=total, loss=f"{len(delta.facts.losses)} steps")

        def write(name: str, data: bytes) -> None:
            check_replaceable(paths[name], name)
            write_atomically(paths[name], data)
            bar.update(tasks[name], completed=total, loss="done")

        try:
            if not todo:
                log.print("Nothing is left to train.")
            elif workers:
                begin([group.names[0] for group in todo])
                train_on_workers(setup, todo, workers, address, write, lambda report: show(report.progress), check)
            else:
                job = setup.job(todo, progress(bar, check), check)
                if tell_mode:
                    log.print(f"Null space: {job.planner.mode}")
                train_book(job, save, on_step, check, begin)
        except Interrupted:
            log.print("Stopped; run the same command with --resume to go on.")
            raise typer.Exit(130) from None


def _pictures(host: ImageEncoder, folder: Path | None, names: list[str], check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The user's pictures of every concept as clean latents; concepts without a subfolder share the folder."""
    from ..images import load_folder
    from ..train import Pictures

    read: dict[Path, Pictures] = {}
    result: dict[str, Any] = {}
    if folder is None:
        return result
    if not hasattr(host, "encode_images"):
        raise SepMEError("Pictures of one's own are noised for Stable Diffusion alone; leave out --images.")
    for name in names:
        own = folder / file_name(name)
        own = own if own.is_dir() else folder
        if own not in read:
            images, digest = load_folder(own, host.image_size)
            read[own] = Pictures(host.encode_images(images, check), digest)
        result[name] = read[own]
    return result


def _draw(host: Any, check: Callable[[], None] = lambda: None) -> Draw | None:
    """See :func:`~sepme.hosts.diffusers.thumbnails`, which is imported no sooner than that."""
    from ..hosts.diffusers import thumbnails

    return thumbnails(host, check)
