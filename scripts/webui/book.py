"""The concept book as rows of fields: a concept each, with the prompts that mean it and what takes its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from ...sepme.concepts import ConceptBook
from ...sepme.errors import SepMEError
from . import host

ROWS, AT_FIRST, FIELDS = 24, 2, 3
SEPARATOR = ";"


class BookRows:
    """The fields; ``fields`` in the order of what :func:`book_of` reads."""

    def __init__(self) -> None:
        self.fields: list[Any] = []
        rows = []
        for i in range(ROWS):
            with gr.Row(visible=i < AT_FIRST, elem_id=f"sepme_book_row_{i}") as row:
                self.fields += [
                    gr.Textbox("", label="Concept", placeholder="van gogh", elem_id=f"sepme_book_name_{i}"),
                    gr.Textbox(
                        "", label=f"Prompts that mean it, with {SEPARATOR} between", placeholder="made from the name",
                        elem_id=f"sepme_book_prompts_{i}", scale=2,
                    ),
                    gr.Textbox("", label="What takes its place", placeholder="nothing special", elem_id=f"sepme_book_anchor_{i}"),
                ]  # fmt: skip
            rows.append(row)
        more = gr.Button("Add a concept", elem_id="sepme_book_more", size="sm")
        self.fields.append(
            gr.Textbox(
                "", label="Prompts that must not change at all, one per line", placeholder="a company logo", lines=2,
                elem_id="sepme_book_preserve",
            )
        )  # fmt: skip
        count = gr.State(AT_FIRST)
        more.click(_one_more, [count], [count, *rows], show_progress=False, api_name=False)


def _one_more(count: int) -> list[Any]:
    count = min(count + 1, ROWS)
    return [count, *(gr.update(visible=i < count) for i in range(ROWS))]


def book_of(fields: Sequence[str]) -> str:
    """The book that the fields say, as JSON.

    Raises:
        SepMEError: no row names a concept, or one has prompts and no name.
    """
    *cells, preserve = (str(field or "").strip() for field in fields)
    concepts = []
    for name, prompts, anchor in (cells[i : i + FIELDS] for i in range(0, len(cells), FIELDS)):
        given = {"prompts": [prompt.strip() for prompt in prompts.split(SEPARATOR) if prompt.strip()], "anchor": anchor}
        if name:
            concepts.append({"name": name, **{key: value for key, value in given.items() if value}})
        elif prompts or anchor:
            raise SepMEError(f"A row says {prompts or anchor!r} and names no concept; write its name in the first field.")
    if not concepts:
        raise SepMEError("No concept is named; write what is to be erased into the first field.")
    return json.dumps({"concepts": concepts, "preserve": [line.strip() for line in preserve.splitlines() if line.strip()]})


def parse(text: str) -> ConceptBook:
    """The book; its preserve file, if any, lies in the delta folder, since this page may be open to others."""
    book = ConceptBook.loads(text)
    return replace(book, preserve_file=str(host.library.place(book.preserve_file))) if book.preserve_file else book
