"""The command line: ``sepme demo | train | inspect | verify | generate | bench``.

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
from dataclasses import replace
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
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed and size on this machine.")
app.add_typer(bench, name="bench")
log = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Files = Annotated[list[Path], typer.Argument(help="Delta files.")]
Model = Annotated[str, typer.Argument(help="'demo', a diffusers folder or a .safetensors checkpoint (SD 1.x, 2.x, XL).")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
DType = Annotated[str, typer.Option(help="The model's precision: float32, float16 or bfloat16; deltas are trained in float32.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of CLIP's tokenizer, for single-file checkpoints.", envvar="SEPME_TOKENIZER")]
Prediction = Annotated[str | None, typer.Option(help="What the UNet predicts, epsilon or v_prediction; found out if not given.")]
Size = Annotated[int | None, typer.Option(help="Pixels of an image's side; the model's own if not given.")]


def file_name(concept: str) -> str:
    """File name of a concept's delta: word characters of its name, joined by '-'."""
    name = "-".join(re.findall(r"\w+", concept.casefold())) or "concept"
    return name.encode()[:200].decode(errors="ignore")  # file systems take 255 bytes, endings included


def _finish(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(data, indent=2, sort_keys=True))
    else:
        show()


def _host(
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    tokenizer: Path | None = None,
    prediction: str | None = None,
    size: int | None = None,
) -> Any:
    try:
        import diffusers
        import transformers

        from .hosts.diffusers import DiffusersHost
        from .hosts.loading import DTYPES, LoadOptions
    except ImportError as error:
        if out_of_memory(error):
            raise
        raise SepMEError(
            f"This command needs diffusers and transformers ({error.name} is missing); run: pip install 'comfyui-sepme[cli]'."
        ) from None
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise SepMEError(f"There is no precision {dtype!r}; choose one of {', '.join(DTYPES)}.")
    options = LoadOptions(device, DTYPES[dtype], str(tokenizer) if tokenizer else None, prediction, size)
    return DiffusersHost.load(model, options=options)


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
    null_space: Annotated[
        str | None,
        typer.Option(help="exact, tolerance, soft, or auto: the strictest that fits; by default tolerance, in mode paper exact."),
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Relative singular value that counts as null (default 0.006).")] = None,
    preserve: Annotated[Path | None, typer.Option(help="Text file of prompts that must not change, one a line.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Cap on the rank of a delta; by default 8, in mode paper none.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of the concept that the rank must carry, cap allowing (0.9; in mode paper 1, of the delta)."),
    ] = None,
    warm_start: Annotated[bool | None, typer.Option(help="Start G-CiRs from the closed form (default in mode subspace).")] = None,
    values_only: Annotated[bool, typer.Option("--values-only", help="Leave to_k as it is.")] = False,
    pooled: Annotated[
        str | None, typer.Option(help="SDXL's pooled text vector along the concept: replace or leave; by default replace in mode subspace.")
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    tokenizer: Tokenizer = None,
    prediction: Prediction = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Make one delta file for every concept of a book."""
    from .nullspace import Planner
    from .train import Progress as Step
    from .train import TrainOptions, make_deltas, plan_options

    concept_book = ConceptBook.load(book)
    if preserve is not None:
        concept_book = replace(concept_book, preserve_file=str(preserve))
    chosen = list(dict.fromkeys(concept_book[n].name for n in only)) if only else [c.name for c in concept_book.concepts]
    plan = plan_options(mode, mode=null_space, tolerance=tolerance, max_rank=max_rank, energy=energy, pooled=pooled)
    own: dict[str, Any] = {"learning_rate": learning_rate, "warm_start": warm_start}  # None: the mode's
    options = TrainOptions(
        objective=objective, mode=mode, steps=steps, batch=batch, threshold=threshold, regularise=regularise, seed=seed,
        values_only=values_only, **own,
    )  # fmt: skip
    paths = {name: out / f"{file_name(name)}.safetensors" for name in chosen}
    if len(set(paths.values())) < len(paths):
        raise SepMEError("Two concepts of the book would get the same file name; rename one.")
    check_writable(out)
    for inner, outer in concept_book.overlaps():
        log.print(f"Note: the words of {inner!r} stand in {outer!r}; erasing one will touch prompts of the other.")
    host = _host(model, device, dtype, tokenizer, prediction, size)
    results = []
    with interruptible() as check, _bar() as bar:
        pictures = _pictures(host, images, chosen, check)
        planner = Planner(host, concept_book, plan, on_progress=_tasks(bar, check))
        if mode == "subspace":  # all gates in one pass over what calibrates them
            planner.plan_all(list(paths))  # the same group whether resumed or not, so that the bytes are the same
        if null_space == "auto":
            log.print(f"Null space: {planner.mode}")
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


def _tasks(bar: Progress, check: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress callback with one bar for each thing that is going on."""
    tasks: dict[str, Any] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        check()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total, loss="")
        bar.update(tasks[what], completed=done)

    return on_progress


def _summary(delta: ConceptDelta, path: Path) -> dict[str, Any]:
    certificate = delta.info.get("certificate", {})
    keys = ("kept_energy", "gate_low", "gate_high", "gate_overlap", "false_touch_rate", "null_dims", "pooled")
    leak = {f"{k}_max": max(certificate.get(k, {}).values(), default=0.0) for k in ("leakage_linear", "leakage_gated")}
    return {
        "concept": delta.concept.name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "rank": delta.rank,
        "mode": certificate.get("mode", "?"),
        "architecture": delta.architecture,
        "objective": delta.info.get("objective", {}).get("name", "?"),
        "steps": delta.info.get("objective", {}).get("steps", 0),
        "gate": delta.gate,
        "content_hash": delta.content_hash(),
        **leak,
        **{k: certificate.get(k) for k in keys},
    }


def _show_summaries(rows: list[dict[str, Any]]) -> None:
    table = Table("concept", "rank", "mode", "kB", "objective", "steps", "leak (linear)", "leak (gated)", "gate", "margin", "file")
    for r in rows:
        margin = f"{r['gate_low']:.3f} < {r['gate']:.3f} < {r['gate_high']:.3f}" if r["gate_low"] is not None else "?"
        table.add_row(
            r["concept"], str(r["rank"]), r["mode"], f"{r['bytes'] / 1000:.0f}", r["objective"], str(r["steps"]),
            f"{r['leakage_linear_max']:.4f}",
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
            if d["pooled"] is not None:
                print(f"{d['concept']}: pooled text vector {d['pooled']['mode']}, residual {d['pooled']['residual']:.3f}")

    _finish(data, as_json, show)


@app.command()
def verify(
    model: Model,
    files: Files,
    capacity: Annotated[bool, typer.Option("--capacity", help="Report how many concepts fit instead; a book will do.")] = False,
    count: Annotated[list[int] | None, typer.Option(help="Number of concepts for --capacity (repeatable): 10, 30, 100, 1000.")] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    tokenizer: Tokenizer = None,
    prediction: Prediction = None,
    as_json: Json = False,
) -> None:
    """Recompute certificates with the model's own text encoder: leakage matrix, gate margins, false touches."""
    if capacity:
        return _capacity(lambda: _host(model, device, dtype, tokenizer, prediction), model, files, count, as_json)
    from .nullspace import encode, leakage_matrix, mentions, ordinary_prompts, ratios

    deltas = [ConceptDelta.load(path) for path in files]
    host = _host(model, device, dtype, tokenizer, prediction)
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
    encodings = {d.concept.name: encode(host, d.concept.prompts) for d in deltas}
    contexts = {name: encoding.context for name, encoding in encodings.items()}
    corpus = ordinary_prompts()[1::2]
    ordinary = encode(host, corpus).context
    empty = encode(host, [""]).context
    for delta in deltas:
        name = delta.concept.name
        own = ratios(contexts[name], delta.down)
        foreign = {c["name"]: [p for p in c["prompts"] if not mentions(p, name)] for c in delta.info.get("known", [])}
        known = {n: encode(host, prompts).context for n, prompts in foreign.items() if prompts}
        kept = delta.info.get("preserve", {}).get("prompts", [])
        known |= {"(empty prompt)": empty} | ({"(preserved prompts)": encode(host, kept).context} if kept else {})
        leakage = {n: float(ratios(c, delta.down).max()) for n, c in known.items()}
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
                "pooled": _pooled(delta, encodings[name].pooled, encode(host, [delta.concept.anchor]).pooled),
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


def _capacity(host: Callable[[], Any], model: str, files: list[Path], counts: list[int] | None, as_json: bool) -> None:
    from .capacity import COUNTS, capacity, read_concepts

    book = read_concepts(files)
    with interruptible() as check, _bar() as bar:
        rows = [r.to_json() for r in capacity(host(), book, counts or COUNTS, on_progress=_tasks(bar, check))]

    def show() -> None:
        table = Table(*(key.replace("_", " ") for key in rows[0]))
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(width=max(Console().width, 150)).print(table)

    _finish({"model": model, "given": len(book.concepts), "capacity": rows}, as_json, show)


@bench.command("solver")
def bench_solver(
    budget: Annotated[float, typer.Option(help="Seconds that the published solver may take.")] = 60.0,
    concepts: Annotated[int, typer.Option(help="Concepts planned at each width.")] = 1000,
    as_json: Json = False,
) -> None:
    """Null-space solver against sympy, planning of 1000 concepts, closed form of 100; takes some minutes."""
    from .bench.solver import SolverOptions, run

    with interruptible() as check, _bar() as bar:
        data = run(SolverOptions(budget=budget, concepts=concepts), _tasks(bar, check))

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

    _finish(data, as_json, show)


def _pooled(delta: ConceptDelta, own: Any, anchor: Any) -> dict[str, Any] | None:
    from .pooled import residual

    if own is None or anchor is None:
        return None
    return {"mode": "replaced" if delta.pooled is not None else "left", "residual": residual(delta.pooled, own, anchor)}


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
    device: Device = "cpu",
    dtype: DType = "float32",
    tokenizer: Tokenizer = None,
    prediction: Prediction = None,
    size: Size = None,
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
    host = _host(model, device, dtype, tokenizer, prediction, size)
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
        metrics = tell(host, out, images, concepts, _tasks(bar, check))

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
    try:
        code = app(standalone_mode=False)
    except SepMEError as error:
        print(f"sepme: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = 2
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        print("sepme: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, or of the copy of click that newer typer carries
            print(f"sepme: {' '.join(error.format_message().split())}", file=sys.stderr)
        elif out_of_memory(error):
            print("sepme: out of memory; close other programs, ask for less at once or use a machine with more memory", file=sys.stderr)
        else:
            raise
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
