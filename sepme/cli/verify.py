"""``sepme verify``: certificates and capacity with a model's own text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..concepts import ConceptBook, file_name
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..files import remove_leftovers
from ..plan.nearby import COUNT
from .common import finish, interruptible, log, progress, progress_bar, show_table
from .files import model_of, targets
from .inspect import summary
from .options import Files, Json, ModelOptions, NearbyWords, Preserve, grouped

if TYPE_CHECKING:
    from ..delta.verify import Verification
    from ..plan.tally import Tally


@grouped
def verify(
    model: ModelOptions,
    files: Files,
    capacity: Annotated[bool, typer.Option("--capacity", help="Report how many concepts fit instead; a book will do.")] = False,
    count: Annotated[list[int] | None, typer.Option(help="Number of concepts for --capacity (repeatable): 10, 30, 100, 1000.")] = None,
    preserve: Preserve = None,
    nearby: NearbyWords = COUNT,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Make deltas again that change nearby words or miss prompts of the concept, with the worst words on the preserve list.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what --fix makes.")] = Path("fixed"),
    draw: Annotated[Path | None, typer.Option(help="Folder for pictures of the five nearby prompts that change most.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what else files change on this model."""
    if capacity:
        return _capacity(model, files, count, as_json)
    from ..delta.verify import verify as measure

    deltas = [ConceptDelta.load(path) for path in files]
    paths = targets(out, deltas, files, "--fix would write one over the other, name one of them at a time") if fix else []
    host, _, warnings = model_of(deltas, model, draws=draw is not None, training=draw is None)
    with interruptible() as check, progress_bar() as bar:
        result = measure(host, deltas, preserve, progress(bar, check), nearby)
    warnings += result.warnings

    facts: dict[str, Any] = {}
    if draw is not None:
        facts["drawn"] = [str(_drawn(host, d, c.examples, draw)) for d, c in zip(deltas, result.checks, strict=True) if c.examples]
    if fix:
        rows = zip(deltas, result.checks, paths, strict=True)
        facts["fixed"] = [
            _fixed(host, d, c.collateral, c.misses, path)
            for d, c, path in rows
            if c.collateral and c.misses and c.collateral.count + c.misses.count
        ]
    finish(result.to_json() | {"warnings": warnings} | facts, as_json, lambda: _show(result, warnings))
    if not as_json:
        for name, rows_ in ((n, r) for n, r in facts.items() if r):
            log.print("\n".join(f"{name}: {row if isinstance(row, str) else row['file'] + ': ' + row['verdict']}" for row in rows_))
    if not result.holds:
        raise typer.Exit(1)


def _show(result: Verification, warnings: Sequence[str]) -> None:
    """Print what was measured."""
    for warning in warnings:
        log.print(f"Warning: {warning}")
    table = Table("delta \\ prompts of", *(c.concept for c in result.checks), "worst known", "gate", "own prompts", "false touch", "holds")
    for c, line in zip(result.checks, result.matrix.tolist(), strict=True):
        worst = max(c.leakage_linear.values(), default=0.0)
        figures = (f"{worst:.4f}", f"{c.gate:.4f}", f"{c.own_touched:.0%}", f"{c.false_touch_rate:.2%}", "yes" if c.holds else "NO")
        table.add_row(c.concept, *(f"{v:.3f}" for v in line), *figures)
    show_table(table, 60 + 12 * len(result.checks))
    for c in result.checks:
        print(f"{c.concept}: {c.verdict}")
        for text, part in c.parts.items():
            print(f"{c.concept}, text {text}: {'holds' if part.holds else 'does not hold'}")


def _fixed(host: Any, delta: ConceptDelta, collateral: Tally, misses: Tally, path: Path) -> dict[str, Any] | str:
    """A delta made again with the words that it changes preserved; it is saved if it is better, and what is said of it."""
    from ..train.again import made_again

    words = collateral.worst
    with interruptible() as check, progress_bar() as bar:
        new = made_again(
            host, host if hasattr(host, "attention_layers") else None, delta, words, progress(bar, check), lambda step: check(), check
        )
    after = new.certificate
    if after.collateral and after.misses and after.collateral.share + after.misses.share >= collateral.share + misses.share:
        return f"{delta.concept.name} would be no better with these words preserved, so nothing was written ({new.verdict})"
    remove_leftovers(path)
    new.save(path)
    return summary(new, path) | {"added": list(words)}


def _drawn(host: Any, delta: ConceptDelta, prompts: Sequence[str], folder: Path) -> Path:
    """The prompts without the delta (above) and with it, as one picture."""
    import torch

    from ..apply.composition import Composition
    from ..images import save_grid

    seeds = list(range(len(prompts)))
    rows = [host.generate(prompts, seeds, composition, steps=25) for composition in (None, Composition((delta,)))]
    return save_grid(torch.cat(rows), folder / f"{file_name(delta.concept.name)}-nearby.png", columns=len(prompts))


def read_concepts(paths: Sequence[Path]) -> ConceptBook:
    """The concepts of one book, or of delta files.

    Raises:
        SepMEError: a book beside other files, or a file of neither kind.
    """
    books = [p for p in paths if p.suffix.lower() in (".yaml", ".yml", ".json")]
    if books and len(paths) > 1:
        raise SepMEError(f"{books[0]} is a concept book; give either one book or delta files.")
    return ConceptBook.load(books[0]) if books else ConceptBook(tuple(ConceptDelta.load(p).concept for p in paths))


def _capacity(model: ModelOptions, files: list[Path], counts: list[int] | None, as_json: bool) -> None:
    from ..checks import check_number
    from ..plan.capacity import COUNTS, capacity

    for number in counts or ():
        check_number("count", number, 1, 10**6, whole=True)
    book = read_concepts(files)
    with interruptible() as check, progress_bar() as bar:
        rows = [r.to_json() for r in capacity(model.load(), book, counts or COUNTS, on_progress=progress(bar, check))]

    def show() -> None:
        table = Table(*(key.replace("_", " ") for key in rows[0]))
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        show_table(table, 150)

    finish({"model": model.model, "given": len(book.concepts), "capacity": rows}, as_json, show)
