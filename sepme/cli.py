"""The command line: ``sepme demo | train | inspect | verify | generate``.

Exit codes: 0 done, 1 a check did not hold, 2 bad input (one line on stderr), 130 interrupted. With ``--json`` every command
writes exactly one JSON document to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .concepts import ConceptBook
from .delta import ConceptDelta, check_writable, remove_leftovers
from .errors import Interrupted, SepMEError, out_of_memory

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Separable multi-concept erasure.")
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure this machine.")
app.add_typer(bench, name="bench")
log = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Files = Annotated[list[Path], typer.Argument(help="Delta files.")]
Model = Annotated[str, typer.Argument(help="'demo' or a diffusers folder.")]


def file_name(concept: str) -> str:
    """File name of a concept's delta: word characters of its name, joined by '-'."""
    name = "-".join(re.findall(r"\w+", concept.casefold())) or "concept"
    return name.encode()[:200].decode(errors="ignore")  # file systems take 255 bytes, endings included


def _finish(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(data, indent=2, sort_keys=True))
    else:
        show()


def _host(model: str) -> Any:
    try:
        import diffusers
        import transformers

        from .hosts.diffusers import DiffusersHost
    except ImportError as error:
        if out_of_memory(error):
            raise
        raise SepMEError(
            f"This command needs diffusers and transformers ({error.name} is missing); run: pip install 'comfyui-sepme[cli]'."
        ) from None
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return DiffusersHost.load(model)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C and SIGTERM into :class:`Interrupted` at the next check, so that work stops between two steps."""
    stopped = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True

    def check() -> None:
        if stopped:
            raise Interrupted

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@app.command()
def train(
    model: Model,
    book: Annotated[Path, typer.Argument(help="Concept book (YAML or JSON).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the delta files.")],
    objective: Annotated[str, typer.Option(help="gcirs or closed-form.")] = "gcirs",
    mode: Annotated[
        str, typer.Option(help="How increments are parametrised: subspace, paper (as published) or unrestricted (never to be restored).")
    ] = "subspace",
    joint: Annotated[bool, typer.Option("--joint", help="Train the concepts together, balanced, not one by one.")] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures to noise (a subfolder named as a concept's file goes before the folder itself).")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train only these concepts of the book.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from checkpoints, skip finished concepts.")] = False,
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 1000,
    batch: Annotated[int, typer.Option(help="Draws a step.")] = 4,
    learning_rate: Annotated[
        float | None, typer.Option(help="Adam's; by default 0.03 (subspace), 0.1 (paper), 1e-5 (unrestricted).")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Training stops when the momentum of the loss falls to this.")] = 0.0,
    regularise: Annotated[str, typer.Option(help="What the L1 term is taken of: w or delta.")] = "w",
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    null_space: Annotated[str | None, typer.Option(help="exact or tolerance; by default tolerance, in mode paper exact.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Relative singular value that counts as null (default 0.006).")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Cap on the rank of a delta; by default 8, in mode paper none.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of the concept that the rank must carry, cap allowing (0.9; in mode paper 1, of the delta)."),
    ] = None,
    warm_start: Annotated[bool | None, typer.Option(help="Start G-CiRs from the closed form (default in mode subspace).")] = None,
    values_only: Annotated[bool, typer.Option("--values-only", help="Leave to_k as it is.")] = False,
    as_json: Json = False,
) -> None:
    """Make one delta file for every concept of a book."""
    from .nullspace import Planner
    from .train import Progress as Step
    from .train import TrainOptions, make_deltas, plan_options

    concept_book = ConceptBook.load(book)
    chosen = list(dict.fromkeys(concept_book[n].name for n in only)) if only else [c.name for c in concept_book.concepts]
    plan = plan_options(mode, mode=null_space, tolerance=tolerance, max_rank=max_rank, energy=energy)
    options = TrainOptions(
        objective=objective, mode=mode, steps=steps, batch=batch, threshold=threshold, regularise=regularise,
        seed=seed, learning_rate=learning_rate, warm_start=warm_start, values_only=values_only,  # type: ignore[arg-type]
    )  # fmt: skip
    paths = {name: out / f"{file_name(name)}.safetensors" for name in chosen}
    if len(set(paths.values())) < len(paths):
        raise SepMEError("Two concepts of the book would get the same file name; rename one.")
    check_writable(out)
    for inner, outer in concept_book.overlaps():
        log.print(f"Note: the words of {inner!r} stand in {outer!r}; erasing one will touch prompts of the other.")
    host = _host(model)
    results = []
    with interruptible() as check, _bar() as bar:
        pictures = _pictures(host, images, chosen, check)
        planner = Planner(host, concept_book, plan)
        for group in [chosen] if joint else [[name] for name in chosen]:
            checkpoint = (out / "joint" if len(group) > 1 else paths[group[0]].with_suffix("")).with_suffix(".checkpoint.safetensors")
            for path in (checkpoint, *(paths[n] for n in group)):
                remove_leftovers(path)
            if not resume:
                checkpoint.unlink(missing_ok=True)
            elif all(paths[n].exists() for n in group) and not checkpoint.exists():
                for name in group:
                    results.append(_summary(ConceptDelta.load(paths[name]), paths[name]))
                    log.print(f"{name}: already made ({paths[name]})")
                continue
            tasks = {name: bar.add_task(name, total=options.steps, loss="") for name in group}

            def on_step(step: Step, tasks: dict[str, Any] = tasks) -> None:
                bar.update(tasks[step.concept], completed=step.step, loss=f"loss {step.loss:.5f}")
                check()

            try:
                deltas = make_deltas(planner, group, host, options, checkpoint, on_step, pictures, check)
            except Interrupted:
                log.print(f"Stopped at {', '.join(group)}; run the same command with --resume to go on.")
                raise typer.Exit(130) from None
            for delta in deltas:
                name = delta.concept.name
                delta.save(paths[name])
                bar.update(tasks[name], completed=options.steps, loss=f"{len(delta.info['losses'])} steps")
                results.append(_summary(delta, paths[name]))
            checkpoint.unlink(missing_ok=True)
    _finish({"deltas": results}, as_json, lambda: _show_summaries(results))


def _pictures(host: Any, folder: Path | None, names: list[str], check: Callable[[], None]) -> dict[str, Any]:
    """The user's pictures of every concept as clean latents; concepts without a subfolder share the folder."""
    from .images import load_folder
    from .train import Pictures

    read: dict[Path, Pictures] = {}
    result: dict[str, Any] = {}
    if folder is None:
        return result
    for name in names:
        own = folder / file_name(name)
        own = own if own.is_dir() else folder
        if own not in read:
            images, digest = load_folder(own, host.image_size)
            read[own] = Pictures(host.encode_images(images, check), digest)
        result[name] = read[own]
    return result


def _bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(), console=log)


def _summary(delta: ConceptDelta, path: Path) -> dict[str, Any]:
    certificate = delta.info.get("certificate", {})
    keys = ("kept_energy", "gate_low", "gate_high", "gate_overlap", "false_touch_rate", "null_dims")
    leak = {f"{k}_max": max(certificate.get(k, {}).values(), default=0.0) for k in ("leakage_linear", "leakage_gated")}
    return {
        "concept": delta.concept.name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "rank": delta.rank,
        "architecture": delta.architecture,
        "objective": delta.info.get("objective", {}).get("name", "?"),
        "steps": delta.info.get("objective", {}).get("steps", 0),
        "gate": delta.gate,
        "content_hash": delta.content_hash(),
        **leak,
        **{k: certificate.get(k) for k in keys},
    }


def _show_summaries(rows: list[dict[str, Any]]) -> None:
    table = Table("concept", "rank", "kB", "objective", "steps", "leak (linear)", "leak (gated)", "gate", "margin", "file")
    for r in rows:
        margin = f"{r['gate_low']:.3f} < {r['gate']:.3f} < {r['gate_high']:.3f}" if r["gate_low"] is not None else "?"
        table.add_row(
            r["concept"], str(r["rank"]), f"{r['bytes'] / 1000:.0f}", r["objective"], str(r["steps"]), f"{r['leakage_linear_max']:.4f}",
            f"{r['leakage_gated_max']:.4f}", f"{r['gate']:.3f}", margin, r["file"],
        )  # fmt: skip
    Console(width=max(Console().width, 120)).print(table)


@app.command()
def inspect(files: Files, as_json: Json = False) -> None:
    """Show what delta files hold."""
    data = []
    for path in files:
        delta = ConceptDelta.load(path)
        extra = {"prompts": delta.concept.prompts, "anchor": delta.concept.anchor, "d_in": delta.d_in, "projections": len(delta.up)}
        known = [c["name"] for c in delta.info.get("known", [])]
        data.append(_summary(delta, path) | extra | {"known": known, "info": {k: v for k, v in delta.info.items() if k != "losses"}})

    def show() -> None:
        _show_summaries(data)
        for d in data:
            print(f"{d['concept']}: prompts {', '.join(map(repr, d['prompts']))}; separable from {', '.join(d['known']) or 'nothing else'}")

    _finish(data, as_json, show)


@app.command()
def verify(model: Model, files: Files, as_json: Json = False) -> None:
    """Recompute certificates with the model's own text encoder: leakage matrix, gate margins, false touches."""
    from .nullspace import encode, leakage_matrix, mentions, ordinary_prompts, ratios

    deltas = [ConceptDelta.load(path) for path in files]
    host = _host(model)
    from .layers import kv_fingerprint
    from .layers import shapes as kv_shapes

    layers = host.attention_layers()
    shapes = kv_shapes(layers)
    fingerprint = kv_fingerprint(layers)
    warnings: list[str] = []
    rows: list[dict[str, Any]] = []
    for delta in deltas:
        delta.check_fits(shapes)
        if delta.info.get("kv_fingerprint") not in (None, fingerprint):
            warnings.append(f"{delta.concept.name!r} was made on K/V weights {delta.info['kv_fingerprint']}, this model has {fingerprint}.")
    contexts = {d.concept.name: encode(host, d.concept.prompts).context for d in deltas}
    corpus = ordinary_prompts()[1::2]
    ordinary = encode(host, corpus).context
    empty = encode(host, [""]).context
    for delta in deltas:
        name = delta.concept.name
        own = ratios(contexts[name], delta.down)
        known = {c["name"]: encode(host, c["prompts"]).context for c in delta.info.get("known", [])}
        kept = delta.info.get("preserve", {}).get("prompts", [])
        known |= {"(empty prompt)": empty} | ({"(preserved prompts)": encode(host, kept).context} if kept else {})
        leakage = {n: float(ratios(c, delta.down).max()) for n, c in known.items() if not mentions(n, name)}
        strangers = [i for i, p in enumerate(corpus) if not mentions(p, name)]
        touched = ratios(ordinary, delta.down)[strangers] > delta.gate
        rows.append(
            {
                "concept": name,
                "gate": delta.gate,
                "own_min": float(own.min()),
                "own_touched": float((own > delta.gate).float().mean()),
                "leakage_linear": leakage,
                "leakage_gated": {n: v if v > delta.gate else 0.0 for n, v in leakage.items()},
                "false_touch_rate": float(touched.float().mean()),
                "holds": bool((own > delta.gate).all()) and all(v <= delta.gate for v in leakage.values()),
            }
        )
    matrix = leakage_matrix({d.concept.name: d.down for d in deltas}, contexts).tolist()
    holds = all(r["holds"] for r in rows)

    def show() -> None:
        for warning in warnings:
            log.print(f"Warning: {warning}")
        table = Table("delta \\ prompts of", *contexts, "worst known", "gate", "own prompts", "false touch", "holds")
        for r, line in zip(rows, matrix, strict=True):
            worst = max(r["leakage_linear"].values(), default=0.0)
            ends = (
                f"{worst:.4f}",
                f"{r['gate']:.4f}",
                f"{r['own_touched']:.0%}",
                f"{r['false_touch_rate']:.2%}",
                "yes" if r["holds"] else "NO",
            )
            table.add_row(r["concept"], *(f"{v:.3f}" for v in line), *ends)
        Console(width=max(Console().width, 60 + 12 * len(rows))).print(table)

    _finish({"deltas": rows, "matrix": matrix, "warnings": warnings, "holds": holds}, as_json, show)
    if not holds:
        raise typer.Exit(1)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="Prompts, each with its own <erase:name:strength> and <keep:name> tags.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write; several prompts are laid side by side.")],
    delta: Annotated[list[Path] | None, typer.Option("--delta", help="Delta file (repeatable); on unless kept.")] = None,
    erase: Annotated[list[str] | None, typer.Option(help="NAME or NAME:STRENGTH (repeatable).")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="NAME to leave as it is (repeatable).")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    seed: Annotated[int, typer.Option(help="Seed; prompt i uses seed + i.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 3.0,
    gate: Annotated[bool, typer.Option(help="Row gate.")] = True,
    as_json: Json = False,
) -> None:
    """Draw pictures with concepts erased."""
    from .composition import Composition
    from .images import save_grid
    from .toggles import merge, parse_tags, strengths

    composition = Composition(tuple(ConceptDelta.load(p) for p in delta or []))
    toggles: dict[str, float] = {}
    for item in erase or []:
        toggles = merge(toggles, parse_tags(f"<erase:{item}>")[1])
    toggles = merge(toggles, dict.fromkeys(keep or [], 0.0))
    table = strengths([merge(toggles, parse_tags(p)[1]) for p in prompts], composition.names)
    if ((table < 0) | (table > 1)).any():
        log.print("Warning: a strength lies outside 0 to 1; negative ones amplify the concept, larger ones overshoot.")
    if out.suffix.lower() != ".png":
        raise SepMEError(f"{out} is no PNG name; end it in .png.")
    check_writable(out.parent)
    remove_leftovers(out)
    host = _host(model)
    with interruptible() as check:
        images = host.generate(
            prompts, [seed + i for i in range(len(prompts))], composition, toggles,
            negative=negative, steps=steps, guidance=guidance, gate=gate, on_step=lambda i: check(),
        )  # fmt: skip
    save_grid(images, out)
    rows = [
        {"prompt": p, "strengths": dict(zip(composition.names, row, strict=True))} for p, row in zip(prompts, table.tolist(), strict=True)
    ]
    _finish({"image": str(out), "rows": rows}, as_json, lambda: log.print(f"Wrote {out}"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the deltas and the report.")] = Path("demo"),
    images: Annotated[int, typer.Option(help="Images a concept and condition.")] = 20,
    concepts: Annotated[int, typer.Option(help="How many of the twelve concepts (for a quick look).")] = 12,
    as_json: Json = False,
) -> None:
    """Erase twelve concepts of the embedded model, one by one and together, and write report.html."""
    from .demo.story import tell

    check_writable(out)
    host = _host("demo")
    with interruptible() as check, _bar() as bar:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            check()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, loss="")
            bar.update(tasks[what], completed=done)

        metrics = tell(host, out, images, concepts, on_progress)

    def show() -> None:
        table = Table("", "G-CiRs", "closed form")
        for key, value in metrics.items():
            if isinstance(value, float) and key in metrics["closed_form"]:
                table.add_row(key, f"{value:.4g}", f"{metrics['closed_form'][key]:.4g}")
        Console().print(table)
        log.print(f"Report: {out / 'report.html'}")

    _finish(metrics, as_json, show)


@bench.command("train")
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
    from .bench.train import Size, run

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

    _finish(result, as_json, show)


def main() -> None:
    """Entry point: one line for bad input, no traceback."""
    import click

    try:
        code = app(standalone_mode=False)
    except SepMEError as error:
        print(f"sepme: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = 2
    except click.ClickException as error:
        print(f"sepme: {' '.join(error.format_message().split())}", file=sys.stderr)
        code = 2
    except (Interrupted, KeyboardInterrupt, click.Abort):
        print("sepme: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if not out_of_memory(error):
            raise
        print("sepme: out of memory; close other programs, ask for less at once or use a machine with more memory", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
