"""The tab: train concepts on the loaded checkpoint, verify deltas with it, export them for tools that know nothing of SepME."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from ...sepme.apply.toggles import parse_json
from ...sepme.checks import check_number
from ...sepme.concepts import file_name
from ...sepme.convert import export_checkpoint, export_lora, model_weights
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.verify import check_encoder, verify
from ...sepme.errors import SepMEError
from ...sepme.model.layers import kv_fingerprint, shapes
from ...sepme.plan.directions import RANGES
from ...sepme.plan.nearby import COUNT
from . import host
from .cards import cards
from .files import choose, labels, load
from .panel import delta_choice
from .progress import TaskStatus, follow, shown, table
from .training import train_page

LORA, CHECKPOINT = "LoRA", "merged copy of the loaded checkpoint"


def make_tab() -> list[tuple[Any, str, str]]:
    """The tab as the host wants it: blocks, title, id."""
    with gr.Blocks(analytics_enabled=False) as blocks, gr.Tabs():
        with gr.Tab("Train"):
            train_page()
        with gr.Tab("Verify"):
            _verify_page()
        with gr.Tab("Export"):
            _export_page()
    return [(blocks, "SepME", "sepme_tab")]


def _verify_page() -> None:
    gr.HTML("<p>Measures gates and leakage of deltas again, with the text encoder of the loaded checkpoint.</p>")
    files = _file_choice("sepme_verify_files")
    nearby = gr.Number(
        COUNT, label="Nearby words", precision=0, elem_id="sepme_verify_nearby",
        info="of the tokenizer's own that are looked at: which of them change; 0: none",
    )  # fmt: skip
    start = gr.Button("Verify", variant="primary", elem_id="sepme_verify")
    status, curve = gr.HTML(elem_id="sepme_verify_status"), gr.HTML(visible=False)
    start.click(check, [files, nearby], [status, curve], show_progress=False, api_name="sepme_verify_nearby")
    gr.Button(visible=False).click(check, [files], [status, curve], show_progress=False, api_name="sepme_verify")  # for programs


def _export_page() -> None:
    gr.HTML(
        "<p>A LoRA or a merged checkpoint works everywhere, for every prompt: the gate is off in it, so pictures of other prompts are "
        "close to the stock ones, no longer the same bit for bit.</p>"
    )
    files = _file_choice("sepme_export_files")
    with gr.Row():
        kind = gr.Radio([LORA, CHECKPOINT], value=LORA, label="As", elem_id="sepme_export_kind")
        name = gr.Textbox("erased", label="Name of the new file", elem_id="sepme_export_name")
        strengths = gr.Textbox("", label="Strengths by concept, 1 where not given", placeholder='{"van gogh": 0.7}')
    start = gr.Button("Export", variant="primary", elem_id="sepme_export")
    status, curve = gr.HTML(elem_id="sepme_export_status"), gr.HTML(visible=False)
    start.click(export, [files, kind, name, strengths], [status, curve], show_progress=False, api_name="sepme_export")


def _file_choice(elem_id: str) -> Any:
    with gr.Row():
        files = delta_choice(host.library, "Deltas", elem_id)
        refresh = gr.Button("\u21bb", elem_classes=["tool", "sepme-refresh"], scale=0, min_width=40)
    shown = gr.HTML(elem_id=f"{elem_id}_cards")
    refresh.click(lambda: gr.update(choices=list(labels(host.library.entries()))), [], [files], show_progress=False)
    files.change(lambda chosen: cards(chosen, host.library.entries()), [files], [shown], show_progress=False, api_name=f"{elem_id}_cards")
    return files


def _deltas(chosen: Sequence[str]) -> list[ConceptDelta]:
    entries, found = host.library.entries(), []
    for label in chosen or []:
        entry = choose(label, entries)
        if entry is None:
            raise SepMEError(f"There is no delta {label!r} in {host.library.folder}; refresh the list.")
        found.append(load(entry))
    if not found:
        raise SepMEError("No delta is chosen; choose at least one above.")
    return found


def check(chosen: Sequence[str], nearby: int = 0) -> Iterator[tuple[str, str]]:
    """A table of what was measured; ``nearby``: how many words near each concept are looked at."""

    def work(progress: TaskStatus) -> str:
        deltas = _deltas(chosen)
        check_number("nearby words", nearby, *RANGES["nearby"], whole=True)
        with host.job(), host.loaded_model() as model:
            layers = model.attention_layers()
            fingerprint = kv_fingerprint(layers)
            for delta in deltas:
                delta.check_fits(shapes(layers), "the loaded checkpoint")
            about_encoder = check_encoder(model, deltas)
            found = verify(model, deltas, on_progress=shown(progress), nearby=nearby)
        made = {d.concept.name: d.facts.kv_fingerprint or fingerprint for d in deltas if d.projections}
        others = [
            f"{n!r} was made on K/V weights {f}; the loaded checkpoint has {fingerprint}." for n, f in made.items() if f != fingerprint
        ]
        leakage = ("worst leakage before the gate", "behind it")
        heads = ("concept", "gate", "own prompts pass", *leakage, "false touches", "certificate", "holds")
        rows = [
            (c.concept, c.gate, f"{c.own_touched:.0%}", max(c.leakage_linear.values()), max(c.leakage_gated.values()), c.false_touch_rate,
             c.verdict, "yes" if c.holds else "NO")
            for c in found.checks
        ]  # fmt: skip
        return table(heads, rows) + "".join(f"<p>{html.escape(w)}</p>" for w in (*others, *about_encoder, *found.warnings))

    yield from follow(work)


def export(chosen: Sequence[str], kind: str, name: str, strengths: str) -> Iterator[tuple[str, str]]:
    """Where the file was written."""

    def work(progress: TaskStatus) -> str:
        deltas, table_ = _deltas(chosen), parse_json(strengths or "")
        stem = file_name(name) if name.strip() else "erased"
        folder = host.lora_folder() if kind == LORA else host.checkpoint_folder()
        path = folder / f"{stem}.safetensors"
        if path.exists():
            raise SepMEError(f"There is already a file {path.name} in {folder}; choose another name.")
        progress.show(f"Writing {path.name}", 0, 1)
        if kind == LORA and not any(d.edits_context for d in deltas):
            export_lora(deltas, path, table_)
        else:
            with host.job():  # the host may have to load it
                source = host.checkpoint_file()
            if kind == LORA:
                export_lora(deltas, path, table_, weights=model_weights(source))
            else:
                export_checkpoint(deltas, source, path, table_)
        return f"<p>Wrote {html.escape(str(path))}. Refresh the host's own list to see it.</p>"

    yield from follow(work)
