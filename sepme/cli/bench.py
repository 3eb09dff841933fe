"""``sepme bench``: speed and size on this machine."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import SepMEError
from .common import Json, finish, interruptible, progress, progress_bar

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed and size on this machine.")


@app.command("solver")
def bench_solver(
    budget: Annotated[float, typer.Option(help="Seconds that the published solver may take.")] = 60.0,
    concepts: Annotated[int, typer.Option(help="Concepts planned at each width.")] = 1000,
    as_json: Json = False,
) -> None:
    """Null-space solver against sympy, planning of 1000 concepts, closed form of 100; takes some minutes."""
    from ..bench.solver import SolverOptions, run

    with interruptible() as check, progress_bar() as bar:
        data = run(SolverOptions(budget=budget, concepts=concepts), progress(bar, check))

    def show() -> None:
        table = Table("A", "sympy s", "ours s", "speed-up", "residual (sympy)", "residual (ours)", "cond (sympy)", "cond (ours)")
        for r in data["solver"]:
            theirs, ours = r.get("sympy", {}), r["ours"]
            cells = (theirs.get("seconds"), ours["seconds"], r.get("speedup"))
            pairs = (theirs.get("residual"), ours["residual"], theirs.get("condition"), ours["condition"])
            table.add_row(f"{r['rows']} x {r['d_in']}", *("-" if v is None else f"{v:.3g}" for v in (*cells, *pairs)))
        Console(width=max(Console().width, 120)).print(table)
        for d_in, plan in data["plan"].items():
            print(f"{concepts} concepts planned at d_in {d_in}: {plan['seconds']:.1f} s (mode {plan['mode']})")
        print(f"closed form, 100 concepts: {data['closed_form_100_seconds']:.2f} s; delta: {data['delta_bytes_sd15_rank8']} bytes")

    finish(data, as_json, show)


@app.command("train")
def bench_train(
    channels: Annotated[str, typer.Option(help="Channels of the UNet's blocks.")] = "64,128,256",
    layers: Annotated[int, typer.Option(help="Resnets a block.")] = 2,
    latent: Annotated[int, typer.Option(help="Width and height of the latents.")] = 32,
    d_in: Annotated[int, typer.Option(help="Width of the text encoder.")] = 768,
    tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 77,
    batch: Annotated[int, typer.Option(help="Draws a step.")] = 1,
    known: Annotated[int, typer.Option(help="Other prompts that must not change.")] = 1,
    pairs: Annotated[int, typer.Option(help="Pairs of steps timed.", min=1)] = 7,
    as_json: Json = False,
) -> None:
    """Seconds and peak memory of a training step against the published scheme."""
    from ..bench.train import Size, run

    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", channels):
        raise SepMEError(f"{channels!r} are no numbers of channels; write them like 64,128,256.")
    blocks = tuple(int(c) for c in channels.split(","))
    result = run(Size(blocks, layers, latent, d_in, tokens, batch, known), pairs)

    def show() -> None:
        table = Table("", "published", "ours", "")
        table.add_row(
            "seconds a step", f"{result['seconds_published']:.3f}", f"{result['seconds_ours']:.3f}", f"{result['train_step_speedup']:.2f} x"
        )
        megabytes = [f"{result[k] / 1e6:.0f}" for k in ("memory_published", "memory_ours")]
        table.add_row("peak MB", *megabytes, f"{result['train_memory_ratio']:.2f} x")
        Console().print(table)

    finish(result, as_json, show)
