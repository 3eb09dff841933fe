"""Concepts off a MODEL by their names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..sepme.concepts import normalised
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.errors import SepMEError
from ..sepme.train.erasures import Named
from . import host, queued, workflow
from .concepts import lines
from .deltas import find
from .facts import PageFacts, facts_of_delta
from .graph import saved
from .rows import Row, parse_rows
from .sockets import CATEGORY, Deltas, folded
from .thumbnails import with_thumbnails

ALIASES = ["erase", "remove", "unlearn", "forget", "censor", "ban", "block", "concept"]


class SepMEErase(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        searched = {"search_aliases": ALIASES} if "search_aliases" in {f.name for f in fields(io.Schema)} else {}
        return io.Schema(
            node_id="SepMEErase",
            display_name="SepME Erase",
            category=CATEGORY,
            description="Erase (remove, unlearn, block) concepts: type what must not be in the pictures, press Run. Styles, characters, "
            "objects, brands; each row is a switch with a strength. Everything else stays as it is.",
            inputs=folded([
                io.Model.Input("model", tooltip="The model that draws; its weights stay as they are."),
                io.Clip.Input("clip", tooltip="The text encoder that reads your prompts: the erasure is worked out from it."),
                io.String.Input("concepts", default="[]", tooltip="What must not be in the pictures: rows, or names with commas between."),
                Deltas.Input("deltas", optional=True, tooltip="Erasures made or loaded elsewhere, used along with these rows."),
                io.String.Input(
                    "preserve", multiline=True, default="", optional=True,
                    tooltip="Words and prompts that must not change at all, one per line; more of them leave less room for the concepts.",
                ),
                io.Boolean.Input(
                    "gate", default=True, optional=True,
                    tooltip="On: only prompts that carry a concept change. Off: every prompt may change a little.",
                ),
            ], "preserve", "gate"),
            outputs=[
                io.Model.Output(),
                Deltas.Output("deltas_out", display_name="DELTAS", tooltip="The erasures as files-to-be: save, verify or export them."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,  # of other nodes ComfyUI does not tell a page that was loaded anew what they found when they are cached
            **searched,
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concepts: str = "[]",
        deltas: Sequence[ConceptDelta] | None = None,
        preserve: str = "",
        gate: bool = True,
    ) -> io.NodeOutput:
        queued.refuse(cls.hidden)
        rows, given = parse_rows(concepts), tuple(deltas or ())
        if not rows and not given:
            raise SepMEError("No concept is named; press + Add and type what must not be in the pictures, or bypass this node.")
        loaded = {row.name: cls._loaded(row) for row in rows if row.saved}
        before = (*given, *loaded.values())
        made = cls._made(clip, model, [row for row in rows if not row.saved], preserve, before)
        everything = (*before, *made)
        strengths = {row.name: row.strength for row in rows}
        facts = tuple(_facts(d) for d in made)
        queued.remember(cls.hidden, facts)
        return io.NodeOutput(host.apply_deltas(model, everything, strengths, gate), everything, ui={"sepme_made": facts})

    @classmethod
    def _loaded(cls, row: Row) -> ConceptDelta:
        """The delta of a row from the library or the workflow, which then carries it."""
        extra = cls.hidden.extra_pnginfo if cls.hidden else None
        delta = find(row.file, row.content_hash, extra)
        if normalised(delta.concept.name) != normalised(row.name):
            raise SepMEError(f"The file {row.file!r} erases {delta.concept.name!r}, not {row.name!r}; remove the row and add it again.")
        try:
            entry = workflow.record(delta, row.file, True)
        except SepMEError:  # too large to travel
            entry = workflow.record(delta, row.file, False)
        workflow.remember(extra, delta.content_hash(), entry)
        return delta

    @classmethod
    def _made(cls, clip: Any, model: Any, rows: Sequence[Row], preserve: str, before: Sequence[ConceptDelta]) -> tuple[ConceptDelta, ...]:
        """The erasures of rows that are only named, switched off or not: switches and strengths make nothing anew."""
        taken = {normalised(d.concept.name) for d in before}
        for row in rows:
            if normalised(row.name) in taken:
                raise SepMEError(f"{row.name!r} is in a row and among the deltas; leave it out of one of them.")
        if not rows:
            return ()
        wanted = [Named(row.name, row.prompts, row.anchor, row.said) for row in rows]
        known = sorted((d.concept for d in before), key=lambda c: c.name)
        bar = host.NodeProgress(1)
        made = host.erasures.get(host.text_encoder(clip, model), wanted, lines(preserve), known, bar.stage)
        return with_thumbnails(model, clip, made) if saved(cls.hidden) else made


def _facts(delta: ConceptDelta) -> PageFacts:
    """What the page shows of a row: its certificate, what takes its place, and words near it."""
    near = delta.facts.nearby
    words = {"preserve": list(delta.preserve.prompts), "near": list(near.near), "synonyms": list(near.synonyms)}
    return facts_of_delta(delta) | {"anchor": delta.concept.anchor} | words
