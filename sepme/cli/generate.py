"""``sepme generate`` and ``sepme demo``: pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..files import check_writable, remove_leftovers
from .common import finish, interruptible, log, progress, progress_bar, show_table
from .options import Json, ModelOptions, Size, grouped


@grouped
def generate(
    model: ModelOptions,
    prompts: Annotated[list[str], typer.Argument(help="Prompts, each with its own <erase:name:strength> and <keep:name> tags.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write; several prompts are laid side by side.")],
    delta: Annotated[
        list[Path] | None, typer.Option("--delta", help="Delta file (repeatable); on unless --keep names its concept.")
    ] = None,
    erase: Annotated[list[str] | None, typer.Option(help="NAME or NAME:STRENGTH (repeatable).")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="NAME to leave as it is (repeatable).")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    seed: Annotated[int, typer.Option(help="Seed; prompt i uses seed + i.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 3.0,
    gate: Annotated[bool, typer.Option(help="Row gate.")] = True,
    backend: Annotated[str, typer.Option(help="How keys and values are computed: auto, exact, fused or eager.")] = "auto",
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Draw pictures with things taken out of them."""
    from ..apply.composition import Composition
    from ..apply.toggles import merge, parse_tags, parse_toggle, strengths
    from ..checks import SEEDS, check_number, following_seed
    from ..delta.verify import check_encoder
    from ..images import save_grid

    composition = Composition(tuple(ConceptDelta.load(p) for p in delta or []))
    toggles: dict[str, float] = {}
    for item in erase or []:
        toggles = merge(toggles, parse_toggle(item))
    toggles = merge(toggles, dict.fromkeys(keep or [], 0.0))
    table = strengths([merge(toggles, parse_tags(p)[1]) for p in prompts], composition.deltas)
    if ((table < 0) | (table > 1)).any():
        log.print("Warning: a strength lies outside 0 to 1; negative ones amplify the concept, larger ones overshoot.")
    check_number("seed", seed, *SEEDS, whole=True)
    check_number("steps", steps, 1, 10**6, whole=True)
    check_number("guidance", guidance, -1e3, 1e3)
    if out.suffix.lower() != ".png":
        raise SepMEError(f"{out} is no PNG name; end it in .png.")
    check_writable(out.parent)
    remove_leftovers(out)
    host = model.load(size)
    for warning in check_encoder(host, composition.deltas):
        log.print(f"Warning: {warning}")
    with interruptible() as check:
        images = host.generate(
            prompts, [following_seed(seed, i) for i in range(len(prompts))], composition, toggles,
            negative=negative, steps=steps, guidance=guidance, gate=gate, backend=backend, on_step=lambda i: check(),
        )  # fmt: skip
    save_grid(images, out)
    rows = [
        {"prompt": p, "strengths": dict(zip(composition.names, row, strict=True))} for p, row in zip(prompts, table.tolist(), strict=True)
    ]
    finish({"image": str(out), "rows": rows}, as_json, lambda: log.print(f"Wrote {out}"))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the deltas and the report.")] = Path("demo"),
    images: Annotated[int | None, typer.Option(help="Images per concept and condition; 2, or 20 with --full.")] = None,
    concepts: Annotated[int, typer.Option(help="How many of the eighteen concepts (for a quick look).")] = 18,
    full: Annotated[bool, typer.Option(help="Measure everything, on more pictures: some minutes.")] = False,
    as_json: Json = False,
) -> None:
    """Try it on a small model that comes along.

    Nine things and nine studios' styles are taken out of it, one by one and together, and put back; the pictures are in report.html.
    """
    from ..checks import check_number
    from ..demo.quick import run_quick
    from ..demo.run import run_demo

    images = images if images is not None else 20 if full else 2
    check_number("images", images, 1, 10_000, whole=True)
    check_number("concepts", concepts, 1, 18, whole=True)
    check_writable(out)
    host = ModelOptions("demo").load()
    with interruptible() as check, progress_bar() as bar:
        if full:
            metrics = run_demo(host, out, images, concepts, progress(bar, check))
        else:
            metrics = run_quick(host, out, images, concepts, progress(bar, check), log.print)

    def show() -> None:
        if full:
            table = Table("", "G-CiRs", "closed form")
            for key, value in metrics.items():
                if isinstance(value, float) and key in metrics["closed_form"]:
                    table.add_row(key, f"{value:.4g}", f"{metrics['closed_form'][key]:.4g}")
            show_table(table)
        log.print(f"Report: {out / 'report.html'}")

    finish(metrics, as_json, show)
