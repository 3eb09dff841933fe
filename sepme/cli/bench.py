"""``sepme bench``: speed and size on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import SepMEError
from .common import finish, interruptible, progress, progress_bar, register_kernels, show_table
from .options import Json

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
        show_table(table, 120)
        for d_in, plan in data["plan"].items():
            print(f"{concepts} concepts planned at d_in {d_in}: {plan['seconds']:.1f} s (mode {plan['mode']})")
        print(f"closed form, 100 concepts: {data['closed_form_100_seconds']:.2f} s; delta: {data['delta_bytes_sd15_rank8']} bytes")

    finish(data, as_json, show)


@app.command("train")
def bench_train(
    channels: Annotated[str, typer.Option(help="Channels of the UNet's blocks.")] = "64,128,256",
    layers: Annotated[int, typer.Option(help="Resnets per block.")] = 2,
    latent: Annotated[int, typer.Option(help="Width and height of the latents.")] = 32,
    d_in: Annotated[int, typer.Option(help="Width of the text encoder.")] = 768,
    tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 77,
    batch: Annotated[int, typer.Option(help="Draws per step.")] = 1,
    known: Annotated[int, typer.Option(help="Other prompts that must not change.")] = 1,
    pairs: Annotated[int, typer.Option(help="Pairs of steps timed.", min=1)] = 7,
    as_json: Json = False,
) -> None:
    """Seconds and peak memory of a training step against the published scheme."""
    from ..bench.train import UNetSize, run

    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", channels):
        raise SepMEError(f"{channels!r} are no numbers of channels; write them like 64,128,256.")
    blocks = tuple(int(c) for c in channels.split(","))
    result = run(UNetSize(blocks, layers, latent, d_in, tokens, batch, known), pairs)

    def show() -> None:
        table = Table("", "published", "ours", "")
        table.add_row(
            "seconds per step",
            f"{result['seconds_published']:.3f}",
            f"{result['seconds_ours']:.3f}",
            f"{result['train_step_speedup']:.2f} x",
        )
        megabytes = [f"{result[k] / 1e6:.0f}" for k in ("memory_published", "memory_ours")]
        table.add_row("peak MB", *megabytes, f"{result['train_memory_ratio']:.2f} x")
        show_table(table)

    finish(result, as_json, show)


@app.command("kernel")
def bench_kernel(
    aot: Annotated[bool, typer.Option("--aot", help="Compile for every GPU family instead; needs no GPU.")] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="Family for --aot (repeatable): sm80 to sm120, gfx942, gfx1100; all by default.")
    ] = None,
    width: Annotated[list[int] | None, typer.Option(help="d_in for --aot (repeatable); 768 by default.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each side.", min=1)] = 50,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for <gpu>.json.")] = None,
    as_json: Json = False,
) -> None:
    """The Triton kernels: timed on this GPU against stock and naive projections, or compiled for all of them."""
    from ..bench import kernel
    from ..files import write_atomically

    register_kernels()
    with interruptible() as check, progress_bar() as bar:
        on_progress = progress(bar, check)
        data = kernel.aot(target or (), width or (768,), on_progress) if aot else kernel.measure(repeats, on_progress)
    if out is not None:
        name = "kernel-aot" if aot else re.sub(r"\W+", "-", data["gpu"]).strip("-").lower()
        write_atomically(out / f"{name}.json", json.dumps(data, indent=1, sort_keys=True).encode())
    finish(data, as_json, lambda: _show_aot(data) if aot else _show_kernel(data))
    if aot and not data["ok"]:
        raise typer.Exit(1)


def _show_aot(data: dict[str, Any]) -> None:
    table = Table("target", "kernel", "type", "d_in", "tile", "warps", "stages", "registers", "spills", "shared", "limit", "matrix ops", "")
    for r in data["targets"]:
        c = r.get("config", {})
        tile = " x ".join(str(c[k]) for k in ("block_m", "block_n", "block_k", "block_r")) if c else "-"
        cells = (r.get(k) for k in ("registers", "spills", "shared_bytes", "shared_limit", "tensor_core_instructions"))
        verdict = "ok" if r["ok"] else r.get("error", "NO")
        head = (r["target"], r["kernel"], r["dtype"], str(r.get("d_in") or "-"), tile, str(c.get("warps", "-")), str(c.get("stages", "-")))
        table.add_row(*head, *("-" if v is None else str(v) for v in cells), verdict)
    show_table(table, 150)
    table = Table("model", "rows", "rank", "MB", "GFLOP", *(f"{part}: µs at least" for part in data["roofline"][0]["least_seconds"]))
    for r in data["roofline"]:
        least = (f"{1e6 * s:.1f}" for s in r["least_seconds"].values())
        table.add_row(r["model"], str(r["rows"]), str(r["rank"]), f"{r['bytes'] / 1e6:.1f}", f"{r['flops'] / 1e9:.1f}", *least)
    show_table(table, 150)


def _show_kernel(data: dict[str, Any]) -> None:
    names = list(data["cases"][0]["sides"])
    table = Table("model", "rows", "rank", "type", "stock µs", *(f"{n} / stock" for n in names[1:]), title=data["gpu"])
    for case in data["cases"]:
        sides = case["sides"]
        ratios = (f"{sides[n]['ratio']:.2f}" for n in names[1:])
        head = (case["model"], str(case["rows"]), str(case["rank"]), case["dtype"], f"{1e6 * sides['stock']['seconds']:.1f}")
        table.add_row(*head, *ratios)
    show_table(table, 120)


@app.command("overhead")
def bench_overhead(
    model: Annotated[str, typer.Option(help="demo, or sd15: a random UNet of its size at 8 x 8 latents.")] = "demo",
    concepts: Annotated[list[int] | None, typer.Option(help="Concepts of rank 8 (repeatable); 0, 1, 10 and 100 by default.", min=0)] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a run.", min=2)] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds in which every side runs once.", min=1)] = 7,
    side: Annotated[list[str] | None, typer.Option(help="Run this side beside stock and ours (repeatable); all by default.")] = None,
    comfyui: Annotated[Path | None, typer.Option(help="Measure in this ComfyUI instead of diffusers.", envvar="SEPME_COMFYUI")] = None,
    as_json: Json = False,
) -> None:
    """Sampling with concepts erased against stock, LoRAs and PEFT adapters."""
    from ..bench import comfyui as comfy
    from ..bench import overhead

    chosen = tuple(sorted(set(concepts or (0, 1, 10, 100))))
    with interruptible() as check, progress_bar() as bar:
        on_progress = progress(bar, check)
        if comfyui is not None:
            job = {"bench": "overhead", "model": model, "concepts": chosen, "steps": steps, "rounds": rounds, "sides": side or ()}
            data = comfy.run(comfyui, job)
        else:
            data = overhead.run(model, chosen, steps, rounds, tuple(side or ()), on_progress)

    def show() -> None:
        columns = ("side", "s per run", "of stock", "quartiles", "operators per step", "GFLOP per step", "MB per step")
        table = Table(*columns, title=f"{data['host']}: {model}")
        for name, side in data["sides"].items():
            c = data["per_step"][name]
            table.add_row(
                name, f"{side['seconds']:.3f}", f"{side['ratio']:.3f}", f"{side['low']:.3f} - {side['high']:.3f}",
                str(c["operators"]), f"{c['flops'] / 1e9:.3f}", f"{c['bytes'] / 1e6:.1f}",
            )  # fmt: skip
        show_table(table, 120)
        print(f"deltas {data['delta_bytes'] / 1e6:.1f} MB, cached keys and values {data['cache_bytes'] / 1e6:.1f} MB")

    finish(data, as_json, show)


@app.command("toggle")
def bench_toggle(
    model: Annotated[str, typer.Option(help="demo, or sd15: a random UNet of its size at 8 x 8 latents.")] = "demo",
    pairs: Annotated[int, typer.Option(help="Pairs timed.", min=1)] = 7,
    comfyui: Annotated[Path | None, typer.Option(help="Measure in this ComfyUI instead of diffusers.", envvar="SEPME_COMFYUI")] = None,
    as_json: Json = False,
) -> None:
    """One concept of ten toggled, against a LoRA of ten weighed anew."""
    from ..bench import comfyui as comfy
    from ..bench import toggle

    data = comfy.run(comfyui, {"bench": "toggle", "model": model, "pairs": pairs}) if comfyui is not None else toggle.run(model, pairs)

    def show() -> None:
        table = Table("", "LoRA ms", "ours ms", "", title=f"{data['host']}: {model}; LoRA: {data['lora']}")
        for key, what, ratio in (
            ("seconds_work", "work before the first step", "toggle_speedup_vs_lora"),
            ("seconds_work_last", "the same, the last LoRA of the chain", "toggle_speedup_vs_lora_last"),
            ("seconds_work_all_touch", "the same, the prompt carrying all ten", "toggle_speedup_vs_lora_all_touch"),
            ("seconds_to_first_step", "until the first step is done", "toggle_speedup_end_to_end"),
        ):
            if key in data:
                table.add_row(what, f"{1e3 * data[key]['lora']:.2f}", f"{1e3 * data[key]['ours']:.2f}", f"{data[ratio]:.1f} x")
        show_table(table, 100)

    finish(data, as_json, show)
