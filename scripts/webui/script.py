"""The script that the host calls around every generation: the panel, prompt tags, infotext, and deltas on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ...sepme.apply.composition import Composition
from ...sepme.apply.toggles import merge
from ...sepme.concepts import normalised
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.library import Entry
from ...sepme.errors import SepMEError
from . import host, infotext
from .panel import Panel
from .settings import Settings, Tables, Tags, take_tags
from .shelf import choose, load


@dataclass
class Batch:
    """Tags of one batch of images: of prompts and negative prompts, and of those of the hires pass."""

    positive: list[Tags]
    negative: list[Tags]
    hires: tuple[list[Tags], list[Tags]] | None = None


@dataclass
class Run:
    """What this extension keeps of one generation."""

    settings: Settings
    deltas: dict[str, ConceptDelta]
    batch: Batch | None = None
    attached: host.Attached | None = None

    @property
    def panel(self) -> dict[str, float]:
        """Strengths of the concepts chosen in the panel."""
        return {d.concept.name: self.settings.strength(d.concept.name) for d in self.deltas.values()}


_runs: list[Run] = []  # the one whose deltas are on the model, if any


def _say(p: Any, text: str) -> None:
    """Show a sentence below the picture, in its infotext (all that the API returns) and in the log, once a run."""
    text = text.replace(str(host.library.folder), "models/sepme")  # pictures are shared
    said = p.extra_generation_params.get(infotext.NOTE, "")
    if text not in said:
        p.extra_generation_params[infotext.NOTE] = f"{said} {text}".strip()
        p.comment(f"SepME: {text}")
        print(f"SepME: {text}")


def _release() -> None:
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
        _release()
        return
    if not run.attached.current:
        _attach(p, run)
        if run.attached is not None:
            run.attached.prepare(params)
    if run.attached is not None:
        run.attached.expect(params)


def _attach(p: Any, run: Run) -> None:
    """Put the deltas that any prompt of the batch needs on the model as it is now."""
    _release()
    batch = run.batch
    if batch is None:
        return
    positive, negative = batch.hires if batch.hires is not None and getattr(p, "is_hr_pass", False) else (batch.positive, batch.negative)
    try:
        deltas = dict(run.deltas) | _of_tags(p, run, [*positive, *negative])
        if not deltas:
            return
        tables = Tables.make(Composition(tuple(deltas.values())), run.panel, positive, negative)
        if tables.idle:
            return
        run.attached = host.Attached(p, tables, run.settings, lambda text: _say(p, text))
        _runs.append(run)
    except SepMEError as error:
        _say(p, f"nothing is erased. {error}")


def _of_tags(p: Any, run: Run, rows: Sequence[Tags]) -> dict[str, ConceptDelta]:
    """Deltas that tags name and the panel does not; names without a file are said, and change nothing."""
    found: dict[str, ConceptDelta] = {}
    names = {normalised(n): n for row in rows for n in row}
    for key, name in names.items():
        if key in {normalised(d.concept.name) for d in run.deltas.values()}:
            continue
        entry = _for_tag(p, name)
        if entry is None:
            _say(p, f"there is no delta of {name[:60]!r} for this checkpoint in models/sepme; its tag does nothing.")
            continue
        delta = load(entry)
        found[normalised(delta.concept.name)] = delta
    return found


def _for_tag(p: Any, name: str) -> Entry | None:
    """The file of a concept that a tag names, for the loaded checkpoint."""
    architecture = host.architecture_of(p.sd_model)
    entry = choose(name, host.library.entries(), architecture)
    return entry if entry is not None and entry.architecture == architecture else None


class SepMEScript(host.Script):  # type: ignore[misc,name-defined]
    """The accordion in txt2img and img2img, and its work."""

    sorting_priority = 20

    def title(self) -> str:
        return "SepME concepts"

    def show(self, is_img2img: bool) -> Any:
        return host.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        panel = Panel(host.library, self.elem_id)
        self.infotext_fields = panel.infotext_fields
        self.paste_field_names = list(infotext.KEYS)
        return panel.controls

    def process(self, p: Any, *args: Any) -> None:
        """Read the panel, load what it names, and record it in the infotext."""
        _release()
        p.sepme_run = None
        for key in infotext.KEYS:  # the cells of an X/Y/Z plot share them
            p.extra_generation_params.pop(key, None)
        try:
            settings = _override(p, Settings.parse(*args))
            entries = host.library.entries()
            chosen = _panel_entries(p, settings, entries)
            deltas = {normalised(e.concept): load(e) for e in chosen}
            if len(deltas) < len(chosen):
                raise SepMEError("Two of the chosen files erase the same concept; choose one of them.")
            p.sepme_run = Run(settings, deltas)
            _record(p, p.sepme_run, chosen)
        except SepMEError as error:
            _say(p, f"nothing is erased. {error}")

    def before_process_batch(self, p: Any, *args: Any, prompts: list[str], **kwargs: Any) -> None:
        """Take the tags out of prompts and negative prompts, before the host reads its own tags and encodes them."""
        run: Run | None = getattr(p, "sepme_run", None)
        negatives = p.negative_prompts
        try:
            texts, positive = take_tags(prompts)
            negative_texts, negative = take_tags(negatives)
        except SepMEError as error:
            _say(p, f"the tags are left out. {error}")
            texts, positive = [_without(t) for t in prompts], [{} for _ in prompts]
            negative_texts, negative = [_without(t) for t in negatives], [{} for _ in negatives]
        prompts[:], negatives[:] = texts, negative_texts
        if run is not None:
            run.batch = Batch(positive, negative, self._hires_tags(p, len(prompts)))

    def _hires_tags(self, p: Any, count: int) -> tuple[list[Tags], list[Tags]] | None:
        """The hires pass has prompts of its own, by default the same; the host cuts them into batches after this."""
        if not getattr(p, "enable_hr", False):
            return None
        part = slice(p.iteration * p.batch_size, p.iteration * p.batch_size + count)
        try:
            return take_tags(p.all_hr_prompts[part])[1], take_tags(p.all_hr_negative_prompts[part])[1]
        except SepMEError as error:
            _say(p, f"the tags of the hires prompts are left out. {error}")
            return [{} for _ in range(count)], [{} for _ in range(count)]

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """The hires pass's negative prompts are not parsed by the host: take the tags out."""
        for name in ("hr_prompts", "hr_negative_prompts"):
            if getattr(p, "enable_hr", False) and getattr(p, name, None):
                setattr(p, name, [_without(t) for t in getattr(p, name)])

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Attach anew for every pass; the Forges throw earlier patches away, and call this twice for hires."""
        run: Run | None = getattr(p, "sepme_run", None)
        if run is not None:
            _attach(p, run)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _release()

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        _release()


def _record(p: Any, run: Run, chosen: Sequence[Entry]) -> None:
    """Write what is on into the infotext: the panel's deltas with strengths, and which files the prompts' tags mean."""
    records = [infotext.Record(e.concept, e.content_hash, run.settings.strength(e.concept)) for e in chosen]
    texts = [*p.all_prompts, *p.all_negative_prompts]
    if getattr(p, "enable_hr", False):  # those of the hires pass are None without it
        texts += [*p.all_hr_prompts, *p.all_hr_negative_prompts]
    with suppress(SepMEError):  # said when the batch is read
        tags = merge(*take_tags(list(dict.fromkeys(texts)))[1])
        found = [(_for_tag(p, name), strength) for name, strength in tags.items()]
        used = [infotext.Record(e.concept, e.content_hash, s) for e, s in found if e is not None and e not in chosen]
        if used:
            p.extra_generation_params[infotext.TAGS] = infotext.write(used)
        records_and_tags = [*records, *(infotext.Record(n, "", s) for n, s in tags.items())]
        odd = sorted({r.name for r in records_and_tags if not 0 <= r.strength <= 1})
        if odd:
            _say(p, f"the strength of {', '.join(odd)} lies outside 0 to 1; negative ones amplify, larger ones overshoot.")
    if records:
        p.extra_generation_params[infotext.CONCEPTS] = infotext.write(records)
    if not run.settings.gate:
        p.extra_generation_params[infotext.GATE] = "off"


def add_tags(p: Any, tags: Mapping[str, float]) -> None:
    """Tags that another extension wrote into the prompts after ours were read: for every prompt of the batch."""
    run: Run | None = getattr(p, "sepme_run", None)
    if run is not None and run.batch is not None and tags:
        run.batch.positive = [merge(tags, row) for row in run.batch.positive]


def _override(p: Any, settings: Settings) -> Settings:
    """What an X/Y/Z plot asks for, instead of the panel's."""
    concepts, strength = getattr(p, "sepme_concepts", None), getattr(p, "sepme_strength", None)
    if concepts is not None:
        settings = replace(settings, enabled=bool(concepts), concepts=tuple(concepts))
    return settings if strength is None else replace(settings.at(strength), enabled=True)


def _panel_entries(p: Any, settings: Settings, entries: Sequence[Entry]) -> list[Entry]:
    """Files of the concepts chosen in the panel.

    Raises:
        SepMEError: there is none of a name.
    """
    chosen = []
    for label in settings.concepts if settings.enabled else ():
        entry = choose(label, entries, host.architecture_of(p.sd_model))
        if entry is None:
            raise SepMEError(
                f"There is no delta {label[:60]!r} for this checkpoint in {host.library.folder}; put its file there and refresh."
            )
        chosen.append(entry)
    return chosen


def _without(text: str) -> str:
    """A prompt without tags, also where they cannot be read."""
    try:
        return take_tags([text])[0][0]
    except SepMEError:
        return infotext.ANY_TAG.sub(" ", text).strip()
