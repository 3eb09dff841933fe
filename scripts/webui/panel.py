"""The accordion: which deltas, how strongly, gate, backend."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from ...sepme.apply.projector import BACKENDS
from ...sepme.concepts import split_names
from ...sepme.delta.library import DeltaLibrary, Entry
from ...sepme.errors import SepMEError
from . import infotext
from .cards import LOST, facts, name
from .files import by_concept, by_hash, find, label_of, labels
from .host import InputAccordion, missing
from .settings import Settings

GRADIO_3 = gr.__version__.startswith("3.")
HELP = (
    "Delta files are read from <code>models/sepme</code>. In prompts and negative prompts: <code>&lt;erase:name&gt;</code>, "
    "<code>&lt;erase:name:0.7&gt;</code>, <code>&lt;keep:name&gt;</code>; a prompt's own tags go before what is set here."
)
GATE = "Gate: prompts that carry no chosen concept stay as they are, bit for bit"
STRENGTH = "0 keeps, 1 erases, more overshoots, less than 0 amplifies"
NO_FILES = "There are no delta files yet: make some in the tab SepME, or copy some there."
NAMED = "by its name"
BACKEND_INFO = "auto: exact, and fused where every prompt is changed anyway"


def delta_choice(library: DeltaLibrary, label: str, elem_id: str) -> Any:
    """A multi-select of delta files. Gradio 4 takes values that are not in the list only where it is told to; files come and go."""
    known = {} if GRADIO_3 else {"allow_custom_value": True}
    return gr.Dropdown(list(labels(library.entries())), value=[], multiselect=True, label=label, elem_id=elem_id, scale=8, **known)


class Panel:
    """The controls of one tab; ``controls`` in the order of the API's arguments (:class:`Settings`): only ever append."""

    def __init__(self, library: DeltaLibrary, elem_id: Callable[[str], str]) -> None:
        self.library = library
        with InputAccordion(False, label="SepME concepts", elem_id=elem_id("enabled")) as enabled:
            with gr.Row(elem_classes=["sepme-choice"]):
                concepts = delta_choice(library, "Concepts to erase", elem_id("concepts"))
                refresh = gr.Button("\u21bb", elem_id=elem_id("refresh"), elem_classes=["tool", "sepme-refresh"], scale=0, min_width=40)
            named = gr.Textbox(
                "", label="Erase what is not a file yet", info="names with commas between; worked out with the first picture",
                placeholder="van gogh, picasso", lines=1, max_lines=1, elem_id=elem_id("named"),
            )  # fmt: skip
            rows = gr.HTML(self._rows([], ""), elem_id=elem_id("rows"))
            gate = gr.Checkbox(True, label=GATE, elem_id=elem_id("gate"))
            with gr.Accordion("Backend, strengths as text", open=False), gr.Row():
                backend = gr.Dropdown(list(BACKENDS), value="auto", label="Backend", info=BACKEND_INFO, elem_id=elem_id("backend"))
                strengths = gr.Textbox(
                    "", label="Strengths", info="by concept, 1 where not given", placeholder='{"van gogh": 0.7}', lines=1, max_lines=1,
                    elem_id=elem_id("strengths"), scale=2,
                )  # fmt: skip
            gr.HTML(f'<p class="sepme-help">{HELP}</p>')
        for control, api_name in ((concepts, elem_id("rows")), (strengths, False), (enabled, False), (named, False)):
            control.change(self._rows, [concepts, strengths, named], [rows], show_progress=False, api_name=api_name)
        refresh.click(self._refresh, [concepts], [concepts], show_progress=False, api_name=elem_id("refresh"))
        self.controls = [enabled, concepts, strengths, gate, backend, named]
        self.infotext_fields = [
            (enabled, self._read_enabled),
            (concepts, self._read_concepts),
            (strengths, self._read_strengths),
            (gate, self._read_gate),
            (named, self._read_named),
        ]

    def _refresh(self, chosen: Sequence[str]) -> Any:
        return gr.update(choices=list(labels(self.library.entries())), value=list(chosen or []))

    def _rows(self, chosen: Sequence[str], strengths: str, named: str = "") -> str:
        """A switch and a slider per concept; ``javascript/sepme.js`` writes what they say into the strengths."""
        entries, lacking = self.library.entries(), missing()
        above = f'<p class="sepme-error">{html.escape(lacking)}</p>' if lacking else ""
        try:
            typed = dict.fromkeys(split_names(named))
        except SepMEError as error:
            return f'<p class="sepme-error">{html.escape(str(error))}</p>'
        if not chosen and not typed:
            hint = "Choose concepts above." if entries else NO_FILES
            return f'{above}<p class="sepme-hint">{hint}</p>'
        found = {label: find(label, entries) for label in chosen or ()}
        try:
            settings = Settings.parse(True, list(chosen or []), strengths)
            known = {key: s for key, s in settings.strengths.items() if found.get(key) != [] and key not in typed}  # files come and go
            table, _ = by_concept(known, list({e.content_hash: e for files in found.values() for e in files}.values()), entries)
        except SepMEError as error:
            return f'<p class="sepme-error">{html.escape(str(error))}</p>'
        table = {**settings.strengths, **table}
        rows = [self._row(label, files, table) for label, files in found.items()]
        return above + "".join(rows + [self._row(name, [], table, NAMED) for name in typed])

    @staticmethod
    def _row(label: str, files: Sequence[Entry], strengths: Mapping[str, float], without: str = LOST) -> str:
        """The row of what is chosen under this label, of no file or (for different checkpoints) of several."""
        concept = files[0].concept if files else label
        strength = strengths.get(concept, 1.0)
        quoted = html.escape(concept, quote=True)
        return (
            f'<div class="sepme-row{"" if strength else " sepme-off"}" data-concept="{quoted}">'
            f'<label title="Erase or keep {quoted}"><input type="checkbox" class="sepme-switch"{" checked" if strength else ""}> '
            f"{name(label, files)}</label>"
            f'<input type="range" class="sepme-strength" min="0" max="1.5" step="0.05" value="{strength:g}" '
            f'aria-label="Strength of {quoted}" title="{STRENGTH}">'
            f'<input type="number" class="sepme-number" min="-100" max="100" step="0.05" value="{strength:g}" '
            f'aria-label="Strength of {quoted} as a number" title="{STRENGTH}">'
            f"{facts(files, without)}</div>"
        )

    def _read_enabled(self, params: Mapping[str, str]) -> bool | None:
        records, entries = infotext.read(params), self.library.entries()
        return None if records is None else bool(infotext.read(params, infotext.NAMED)) or any(by_hash(r.hash, entries) for r in records)

    def _read_concepts(self, params: Mapping[str, str]) -> list[str] | None:
        """Labels of the files with these hashes; a hash that is not there is said, and changes nothing else."""
        entries = self.library.entries()
        found = []
        for key in (infotext.CONCEPTS, infotext.TAGS):
            for record in infotext.read(params, key) or []:
                entry = by_hash(record.hash, entries)
                if entry is None:
                    where = self.library.folder
                    _warn(f"SepME: the delta of {record.name!r} ({record.hash}) that this picture was made with is not in {where}.")
                elif key == infotext.CONCEPTS:
                    found.append(label_of(entry, entries))
        return None if infotext.read(params) is None else found

    def _read_strengths(self, params: Mapping[str, str]) -> str | None:
        read = [infotext.read(params, key) for key in (infotext.CONCEPTS, infotext.NAMED)]
        if all(records is None for records in read):
            return None
        strengths = {r.name: r.strength for records in read for r in records or ()}
        return json.dumps(strengths) if strengths else ""

    def _read_named(self, params: Mapping[str, str]) -> str | None:
        records = infotext.read(params, infotext.NAMED)
        return None if records is None else ", ".join(_listed(r.name) for r in records)

    def _read_gate(self, params: Mapping[str, str]) -> bool | None:
        return None if infotext.read(params) is None else params.get(infotext.GATE) != "off"


def _listed(name: str) -> str:
    """A name as a list takes it: in quotes, its own doubled, where it holds what separates names."""
    return '"{}"'.format(name.replace('"', '""')) if re.search('[,\\n"“]', name) else name


def _warn(text: str) -> None:
    print(text)
    with suppress(Exception):  # outside of an event there is no page to show it on
        gr.Warning(text if GRADIO_3 else html.escape(text))  # later ones show it as HTML
