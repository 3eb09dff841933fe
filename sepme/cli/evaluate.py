"""``sepme eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import Interrupted
from ..files import check_writable
from .common import finish, interruptible, log, progress, progress_bar, show_table
from .options import Json, ModelOptions, Size, grouped


@grouped
def evaluate(
    model: ModelOptions,
    suite: Annotated[str, typer.Argument(help="demo, tiny, paper, sd14, sd2, sdxl, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, metrics.json, CSV files, deltas.")],
    judge: Annotated[Path | None, typer.Option(help="Folder of a CLIP model that reads the pictures (suites of real models).")] = None,
    keep_images: Annotated[
        bool, typer.Option("--images", help="Also write all pictures that this run draws for the methods' figures.")
    ] = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Compare ways of erasing, in figures and pictures.

    Run the same command again to go on where it stopped.
    """
    from ..evaluate.classifiers import make_classifier
    from ..evaluate.run import Run
    from ..evaluate.suite import Suite

    chosen = Suite.load(suite)
    check_writable(out)
    host = model.load(size)
    classifier = make_classifier(chosen, judge, host.device, Path(model.model))
    with interruptible() as check, progress_bar() as bar:
        try:
            metrics = Run(host, chosen, out, judge, keep_images, progress(bar, check), check, classifier)()
        except Interrupted:
            log.print("Stopped; run the same command to go on.")
            raise typer.Exit(130) from None

    def show() -> None:
        table = Table("method", "erased", "kept", "co-occurring", "restored =", "untouched =", "attack", "seconds", "kB")
        for key, m in metrics["methods"].items():
            names = (
                "erased_accuracy",
                "kept_accuracy",
                "cooccurring_accuracy",
                "restored_bit_identical",
                "untouched_bit_identical",
                "attack_success",
            )
            table.add_row(key, *(f"{m[n]:.2f}" for n in names), f"{m['seconds']:.1f}", f"{m['bytes'] / 1000:.0f}")
        show_table(table, 110)
        log.print(f"Report: {out / 'report.html'}")

    finish(metrics, as_json, show)
