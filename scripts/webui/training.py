"""The tab's first page: concepts become delta files, by the checkpoint that is loaded."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...sepme.concepts import file_name
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.plan.nearby import COUNT
from ...sepme.plan.planner import Planner
from ...sepme.train import Job, Progress, TrainOptions, each, plan_options, train_book
from ...sepme.train.objectives import OBJECTIVES, described
from ...sepme.train.options import EDITS, MODES
from . import host
from .book import BookRows, book_of, parse
from .progress import TaskStatus, follow, shown, table

BOOK = """concepts:
  - van gogh          # templates make the prompts
  - name: openmoji
    prompts: [openmoji style, a picture by openmoji]
    anchor: a picture  # takes its place
preserve: [a company logo]  # never changes
"""
NULL_SPACES = ("the mode's own", "auto", "exact", "tolerance", "soft")
INTRODUCTION = (
    "<p>Makes one delta file per concept, with the checkpoint that is loaded. Files go to <code>models/sepme</code>; refresh the "
    "accordion afterwards. Concepts that are to be switched independently belong in one book.</p>"
)


def train_page() -> None:
    """The tab's first page: a book of concepts, how they are trained, and what comes of it."""
    gr.HTML(INTRODUCTION)
    with gr.Row():
        with gr.Column(scale=3):
            rows = BookRows()
        with gr.Column(scale=2):
            objective = gr.Dropdown(list(OBJECTIVES), value="gcirs", label="Objective", elem_id="sepme_objective", info=described())
            edit = gr.Dropdown(
                list(EDITS), value="layers", label="Edit", elem_id="sepme_edit", info=" ".join(f"{k}: {v}." for k, v in EDITS.items())
            )
            steps = gr.Slider(1, 1000, value=1000, step=1, label="Steps at most", elem_id="sepme_steps")
            prefix = gr.Textbox("", label="Subfolder or prefix of the files", placeholder="sd15/", elem_id="sepme_prefix")
    with gr.Accordion("Advanced", open=False, elem_id="sepme_advanced"), gr.Row():
        book = gr.Textbox(
            "", label="Concept book as text (YAML or JSON), in place of the rows", placeholder=BOOK, lines=7, elem_id="sepme_book", scale=3
        )
        with gr.Column(scale=2):
            mode = gr.Dropdown(
                list(MODES), value="subspace", label="Mode", elem_id="sepme_mode",
                info="subspace: small files; paper: as published; unrestricted: never to be restored",
            )  # fmt: skip
            null_space = gr.Dropdown(
                list(NULL_SPACES), value=NULL_SPACES[0], label="Null space", elem_id="sepme_null_space",
                info="auto: the strictest in which all concepts fit",
            )  # fmt: skip
            seed = gr.Number(0, label="Seed", precision=0, elem_id="sepme_seed")
            nearby = gr.Number(
                COUNT, label="Nearby words", precision=0, elem_id="sepme_nearby", info="must not change either; 0: none",
            )  # fmt: skip
    with gr.Row():
        start = gr.Button("Train", variant="primary", elem_id="sepme_train")
        stop = gr.Button("Interrupt", elem_id="sepme_interrupt")
    status = gr.HTML(elem_id="sepme_train_status")
    with gr.Accordion("Loss by step", open=False):
        curve = gr.HTML(elem_id="sepme_train_plot")
    options, outputs = [book, objective, mode, null_space, steps, seed, prefix], [status, curve]
    start.click(train, [*options, edit, *rows.fields, nearby], outputs, show_progress=False, api_name="sepme_train_book")
    gr.Button(visible=False).click(train, options, outputs, show_progress=False, api_name="sepme_train")  # for programs: the text alone
    stop.click(host.interrupt, [], [], queue=False)


def train(
    book: str, objective: str, mode: str, null_space: str, steps: float, seed: float, prefix: str, edit: str = "layers",
    *more: str | float
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Status and loss plot, until every concept of the book has its file; the book is the text if there is any, or what the rows say.

    ``more``: the rows' texts, and how many nearby words there are to be; programs that do not say get none, as ever.
    """
    rows = [text for text in more if isinstance(text, str)]
    nearby = next((int(value) for value in more if isinstance(value, (int, float))), 0)

    def work(progress: TaskStatus) -> str:
        concepts = parse(book if book.strip() or not rows else book_of(rows))
        options = TrainOptions.for_mode(mode, objective, steps=int(steps), seed=int(seed), edit=edit)
        names = [c.name for c in concepts.concepts]
        plan = plan_options(mode, concepts=len(names), mode=None if null_space == NULL_SPACES[0] else null_space, nearby=nearby)
        todo = each(names, lambda name: host.library.place(f"{prefix}{file_name(name)}.checkpoint.safetensors"))
        saved: list[tuple[ConceptDelta, Path]] = []

        def on_start(names: Sequence[str]) -> None:
            progress.show(f"{names[0]}: directions", 0, 1)

        def on_step(step: Progress) -> None:
            progress.losses.setdefault(step.concept, []).append(step.loss)
            progress.show(f"{step.concept}: step {step.step} of at most {step.steps}, loss {step.loss:.5f}", step.step, step.steps)
            host.check_interrupted()

        with host.job(), host.loaded_model() as model:
            planner = Planner(model, concepts, plan, on_progress=shown(progress))
            job = Job(planner, model, options, names, todo, draw=host.thumbnails(model, host.check_interrupted))
            train_book(job, lambda d: saved.append((d, host.library.save(d, prefix))), on_step, host.check_interrupted, on_start)
        notes = [f"The words of {a!r} stand in {b!r}: erasing one touches prompts of the other." for a, b in concepts.overlaps()]
        return _summary(saved) + "".join(f"<p>{html.escape(n)}</p>" for n in notes)

    yield from follow(work)


def _summary(saved: Sequence[tuple[ConceptDelta, Path]]) -> str:
    rows: list[tuple[Any, ...]] = []
    for delta, path in saved:
        certificate = delta.certificate
        figures = (delta.rank, delta.facts.objective.steps, delta.gate, certificate.worst_leakage, certificate.false_touch_rate)
        rows.append((delta.concept.name, delta.verdict, path.relative_to(host.library.folder).as_posix(), *figures))
    return table(("concept", "certificate", "file", "rank", "steps", "gate", "worst leakage before the gate", "false touches"), rows)
