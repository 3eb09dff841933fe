"""``sepme export``, ``sepme import`` and ``sepme reproject``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..concepts import Concept, ConceptBook
from ..delta.concept_delta import ConceptDelta
from ..delta.format import check_replaceable
from ..errors import SepMEError
from ..files import check_writable, remove_leftovers
from .common import finish, interruptible, log, progress, progress_bar
from .files import model_of, targets
from .inspect import show_summaries, summary
from .options import Files, Json, ModelOptions, NullSpace, OutFolder, grouped


def export(
    files: Files,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; a new folder for a diffusers model.")],
    to: Annotated[str, typer.Option(help="lora (kohya's layout) or checkpoint (the model's own layout).")] = "lora",
    model: Annotated[
        str | None,
        typer.Option(help="For --to checkpoint, and where a delta edits the context: 'demo', a diffusers folder or a .safetensors file."),
    ] = None,
    erase: Annotated[list[str] | None, typer.Option(help="NAME:STRENGTH (repeatable); 1 where not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of a LoRA: float16, bfloat16 or float32.")] = "float16",
    as_json: Json = False,
) -> None:
    """Write files as a LoRA or a checkpoint.

    Other programs read those; there they act on every prompt, also on those that do not speak of the concept.
    """
    import torch

    from ..apply.toggles import merge, parse_toggle
    from ..convert import export_checkpoint, export_lora, model_weights
    from ..hosts.loading import DEMO

    deltas = [ConceptDelta.load(path) for path in files]
    strengths = merge(*(parse_toggle(item) for item in erase or []))
    remove_leftovers(out)
    source = str(DEMO) if model == "demo" else model
    if to == "lora":
        kind = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}.get(dtype)
        if kind is None:
            raise SepMEError(f"There is no precision {dtype!r}; choose float16, bfloat16 or float32.")
        edits_context = any(d.edits_context for d in deltas)
        export_lora(deltas, out, strengths, kind, model_weights(source) if source and edits_context else None)
    elif to == "checkpoint":
        if source is None:
            raise SepMEError("Merging needs the model; name it with --model.")
        export_checkpoint(deltas, source, out, strengths)
    else:
        raise SepMEError(f"There is no export to {to!r}; choose lora or checkpoint.")
    data = {"file": str(out), "to": to, "concepts": [d.concept.name for d in deltas], "strengths": strengths, "gate": "off"}
    finish(data, as_json, lambda: log.print(f"Wrote {out}. It acts on every prompt: only SepME's own files have the gate."))


@grouped
def import_(
    model: ModelOptions,
    space: NullSpace,
    file: Annotated[Path, typer.Argument(help="LoRA, or weights (whole or partial) made from MODEL, as .safetensors.")],
    name: Annotated[str, typer.Option("--as", help="The concept that the file erases.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Delta file to write.")],
    against: Annotated[Path | None, typer.Option(help="Concept book of everything else that is known.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that means the concept (repeatable).")] = None,
    as_json: Json = False,
) -> None:
    """Make a file of somebody else's LoRA or weights.

    What erases by them then has a switch and leaves other concepts alone; how much of its effect got lost is said.
    """
    from ..convert import import_eraser
    from ..plan.planner import Planner

    book = ConceptBook.load(against) if against is not None else ConceptBook((Concept(name, tuple(prompt or ())),))
    if all(c.name.casefold() != name.strip().casefold() for c in book.concepts):
        book = replace(book, concepts=(*book.concepts, Concept(name, tuple(prompt or ()))))
    elif against is not None and prompt:
        raise SepMEError(f"{against} has prompts of {name!r} already; leave --prompt out or take the concept out of the book.")
    if out.suffix.lower() != ".safetensors":
        raise SepMEError(f"{out} is no name for a delta; end it in .safetensors.")
    check_replaceable(out, name, [file, Path(model.model)])
    check_writable(out.parent)
    remove_leftovers(out)
    plan = space.plan(pooled="leave")
    host = model.load()
    with interruptible() as check, progress_bar() as bar:
        planner = Planner(host, book, plan, on_progress=progress(bar, check))
        delta = import_eraser(planner, name, file, host.attention_layers())
    delta.save(out)
    facts = delta.info["imported"]

    def show() -> None:
        show_summaries([summary(delta, out)])
        log.print(f"On its prompts {facts['response_loss']:.1%} of the file's effect on keys and values was lost.")
        if facts["other_tensors"]:
            log.print(f"{facts['other_tensors']} tensors of the file are no cross-attention to_k or to_v and were left out.")
        if facts.get("own_scale") is False:
            log.print("The LoRA does not say its scale; 1 was taken.")

    finish(summary(delta, out) | {"imported": facts}, as_json, show)


@grouped
def reproject(
    model: ModelOptions,
    space: NullSpace,
    files: Files,
    against: Annotated[Path, typer.Option(help="Concept book of everything that is known now.")],
    out: OutFolder,
    order: Annotated[
        bool, typer.Option("--order-gap", help="Also let the newcomers arrive one by one, in both orders, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make older files spare what was added later.

    They are fitted to new directions, not trained again.
    """
    from ..convert import known_to, order_gap
    from ..convert import reproject as again
    from ..plan.gate import ratios
    from ..plan.planner import Planner

    deltas = [ConceptDelta.load(path) for path in files]
    book = known_to(deltas, ConceptBook.load(against))
    if len({d.pooled is None for d in deltas}) > 1:
        raise SepMEError("Some of the files replace the pooled text vector and some leave it; reproject them apart.")
    paths = targets(out, deltas, files, "reproject them one by one, into different folders")
    host, layers, warnings = model_of(deltas, model)
    rows: list[dict[str, Any]] = []
    with interruptible() as check, progress_bar() as bar:
        pooled = "leave" if deltas[0].pooled is None else "replace"
        plan = space.plan(pooled=pooled)

        def planner_of(known: ConceptBook) -> Planner:
            return Planner(host, known, plan, on_progress=progress(bar, check))

        planner = planner_of(book)
        planner.plan_all([d.concept.name for d in deltas])
        for warning in warnings:
            log.print(f"Warning: {warning}")
        for delta, path in zip(deltas, paths, strict=True):
            name = delta.concept.name
            new = again(planner, delta, layers)
            linear = {c: float(ratios(planner.prompts.encodings[c].context, delta.down).max()) for c in planner.prompts.names if c != name}
            row: dict[str, Any] = {"from": delta.content_hash(), "leakage_before": max(linear.values(), default=0.0)}
            row["response_loss"] = new.info["reprojected"]["response_loss"]
            if order:
                row["order_gap"] = order_gap(delta, book, planner_of, layers)
            remove_leftovers(path)
            new.save(path)
            rows.append(summary(new, path) | row)

    def show() -> None:
        show_summaries(rows)
        table = Table("concept", "leak before", "leak now", "response lost", *(["order gap"] if order else []))
        for r in rows:
            gap = [f"{r['order_gap']:.2e}"] if order else []
            table.add_row(r["concept"], f"{r['leakage_before']:.4f}", f"{r['leakage_linear_max']:.4f}", f"{r['response_loss']:.2e}", *gap)
        log.print(table)

    finish({"deltas": rows}, as_json, show)
