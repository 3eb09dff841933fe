"""``sepme verify``: certificates and capacity with a model's own text encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..delta import ConceptDelta
from .common import Device, DType, Files, Json, Model, Prediction, Tokenizer, finish, interruptible, load_host, log, progress, progress_bar


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
        return _capacity(lambda: load_host(model, device, dtype, tokenizer, prediction), model, files, count, as_json)
    from ..nullspace import encode, leakage_matrix, mentions, ordinary_prompts, ratios

    deltas = [ConceptDelta.load(path) for path in files]
    host = load_host(model, device, dtype, tokenizer, prediction)
    from ..layers import kv_fingerprint
    from ..layers import shapes as kv_shapes

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

    finish({"deltas": rows, "matrix": matrix, "warnings": warnings, "holds": holds}, as_json, show)
    if not holds:
        raise typer.Exit(1)


def _pooled(delta: ConceptDelta, own: Any, anchor: Any) -> dict[str, Any] | None:
    from ..pooled import residual

    if own is None or anchor is None:
        return None
    return {"mode": "replaced" if delta.pooled is not None else "left", "residual": residual(delta.pooled, own, anchor)}


def _capacity(host: Callable[[], Any], model: str, files: list[Path], counts: list[int] | None, as_json: bool) -> None:
    from ..capacity import COUNTS, capacity, read_concepts

    book = read_concepts(files)
    with interruptible() as check, progress_bar() as bar:
        rows = [r.to_json() for r in capacity(host(), book, counts or COUNTS, on_progress=progress(bar, check))]

    def show() -> None:
        table = Table(*(key.replace("_", " ") for key in rows[0]))
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(width=max(Console().width, 150)).print(table)

    finish({"model": model, "given": len(book.concepts), "capacity": rows}, as_json, show)
