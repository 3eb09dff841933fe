"""One generation: what it erases, and its deltas on the model while the host samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...sepme.apply.composition import Composition
from ...sepme.apply.toggles import merge
from ...sepme.concepts import normalised
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.library import Entry
from ...sepme.delta.verify import encoder_warnings
from ...sepme.errors import SepMEError
from . import host, infotext
from .files import choose, find, load, with_hash
from .settings import Settings, Tables, Tags


@dataclass
class BatchTags:
    """Tags of one batch of images: of prompts and negative prompts, and of those of the hires pass."""

    positive: list[Tags]
    negative: list[Tags]
    hires: tuple[list[Tags], list[Tags]] | None = None


@dataclass
class Generation:
    """What this extension keeps of one generation."""

    settings: Settings
    chosen: list[Entry]
    batch: BatchTags | None = None
    attached: host.ModelPatch | None = None

    @property
    def strengths(self) -> dict[Entry, float]:
        """Of the files chosen in the panel."""
        return {e: self.settings.strength(e.concept) for e in self.chosen}


_runs: list[Generation] = []  # the one whose deltas are on the model, if any


def say(p: Any, text: str) -> None:
    """Show a sentence below the picture, in its infotext (all that the API returns) and in the log, once per run."""
    text = text.replace(str(host.library.folder), "models/sepme")  # pictures are shared
    said = p.extra_generation_params.get(infotext.NOTE, "")
    if text not in said:
        p.extra_generation_params[infotext.NOTE] = f"{said} {text}".strip()
        p.comment(f"SepME: {text}")
        print(f"SepME: {text}")


def release() -> None:
    """Take the deltas off the model, if any are on it."""
    while _runs:
        run = _runs.pop()
        if run.attached is not None:
            run.attached.detach()
            run.attached = None


def watch(params: Any) -> None:
    """At every denoising step: announce its rows; patch a model that a refiner put in place; leave other people's runs alone."""
    run = _runs[-1] if _runs else None
    if run is None or run.attached is None:
        return
    p = params.denoiser.p
    if run.attached.p is not p:
        release()
        return
    if not run.attached.current:
        attach(p, run)
        if run.attached is not None:
            run.attached.prepare(params)
    if run.attached is not None:
        try:
            run.attached.expect(params)
        except SepMEError as error:
            release()
            say(p, f"nothing is erased. {error}")


def attach(p: Any, run: Generation) -> None:
    """Put the deltas that any prompt of the batch needs on the model as it is now."""
    release()
    batch = run.batch
    if batch is None:
        return
    positive, negative = batch.hires if batch.hires is not None and getattr(p, "is_hr_pass", False) else (batch.positive, batch.negative)
    try:
        deltas, concepts = _meant(p, run, [*positive, *negative])
        if not deltas:
            return
        rows = ([{concepts[n]: s for n, s in row.items() if n in concepts} for row in part] for part in (positive, negative))
        tables = Tables.make(Composition(tuple(deltas.values())), {e.concept: s for e, s in run.strengths.items()}, *rows)
        if tables.idle:
            return
        for warning in check_encoder(p, list(deltas.values())):
            say(p, warning)
        run.attached = host.ModelPatch(p, tables, run.settings, lambda text: say(p, text))
        _runs.append(run)
    except SepMEError as error:
        say(p, f"nothing is erased. {error}")


def check_encoder(p: Any, deltas: Sequence[ConceptDelta]) -> list[str]:
    """What is to be said of deltas and the text encoder of the checkpoint.

    Raises:
        SepMEError: they were made with another one.
    """
    known = any(d.facts.text_encoder is not None for d in deltas)
    return encoder_warnings(deltas, host.ClipSkip(p.sd_model).clip_skip, host.encoder_fingerprint(p.sd_model) if known else None)


def _meant(p: Any, run: Generation, rows: Sequence[Tags]) -> tuple[dict[str, ConceptDelta], dict[str, str]]:
    """The panel's deltas with those that only tags name, by concept; and the concept that each tag's name means.

    Names that mean none of them are said, and change nothing.
    """
    entries = {normalised(e.concept): e for e in run.chosen}
    concepts: dict[str, str] = {}
    for name in dict.fromkeys(n for row in rows for n in row):
        try:
            entry = for_tag(p, name, list(entries.values()))
            load(entry)
        except SepMEError as error:
            say(p, f"the tag of {name[:60]!r} does nothing. {error}")
            continue
        entries[normalised(entry.concept)] = entry
        concepts[name] = entry.concept
    return {concept: load(entry) for concept, entry in entries.items()}, concepts


def for_tag(p: Any, name: str, chosen: Sequence[Entry]) -> Entry:
    """The file that a tag means: one of those that are chosen, or another one for the loaded checkpoint.

    Raises:
        SepMEError: there is none, or several; or one of a concept of which another file is chosen.
    """
    entries, fitting = host.library.entries(), host.architectures_of(p.sd_model)
    meant = {e.content_hash for e in find(name, [*entries, *chosen])}
    if len(own := [e for e in chosen if e.content_hash in meant]) == 1:
        return own[0]
    entry = choose(name, [e for e in entries if e.architecture in fitting], fitting)
    if entry is None:
        raise SepMEError(f"There is no delta of {name[:60]!r} for this checkpoint in {host.library.folder}.")
    if other := next((e for e in chosen if normalised(e.concept) == normalised(entry.concept)), None):
        raise SepMEError(f"It is another file than {with_hash(other)!r}, which is chosen already; only one of a concept can be on.")
    return entry


def add_tags(p: Any, tags: Mapping[str, float]) -> None:
    """Tags that another extension wrote into the prompts after ours were read: for every prompt of the batch."""
    run: Generation | None = getattr(p, "sepme_run", None)
    if run is not None and run.batch is not None and tags:
        run.batch.positive = [merge(tags, row) for row in run.batch.positive]
