"""The script that the host calls around every generation: the panel, prompt tags, infotext, and deltas on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ...sepme.apply.composition import Composition
from ...sepme.apply.toggles import merge
from ...sepme.checks import check_number
from ...sepme.concepts import normalised
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.library import Entry
from ...sepme.delta.verify import encoder_warnings
from ...sepme.errors import SepMEError
from . import host, infotext
from .axes import means_none
from .files import by_concept, choose, find, load, with_hash
from .panel import Panel
from .settings import Settings, Tables, Tags, take_tags


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
        try:
            run.attached.expect(params)
        except SepMEError as error:
            _release()
            say(p, f"nothing is erased. {error}")


def _attach(p: Any, run: Generation) -> None:
    """Put the deltas that any prompt of the batch needs on the model as it is now."""
    _release()
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
        for warning in _check_encoder(p, list(deltas.values())):
            say(p, warning)
        run.attached = host.ModelPatch(p, tables, run.settings, lambda text: say(p, text))
        _runs.append(run)
    except SepMEError as error:
        say(p, f"nothing is erased. {error}")


def _check_encoder(p: Any, deltas: Sequence[ConceptDelta]) -> list[str]:
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
            entry = _for_tag(p, name, list(entries.values()))
            load(entry)
        except SepMEError as error:
            say(p, f"the tag of {name[:60]!r} does nothing. {error}")
            continue
        entries[normalised(entry.concept)] = entry
        concepts[name] = entry.concept
    return {concept: load(entry) for concept, entry in entries.items()}, concepts


def _for_tag(p: Any, name: str, chosen: Sequence[Entry]) -> Entry:
    """The file that a tag means: one of those that are chosen, or another one for the loaded checkpoint.

    Raises:
        SepMEError: there is none, or several; or one of a concept of which another file is chosen.
    """
    entries, fitting = host.library.entries(), host.architectures_of(p.sd_model)
    meant = {e.content_hash for e in find(name, entries)}
    if len(own := [e for e in chosen if e.content_hash in meant]) == 1:
        return own[0]
    entry = choose(name, [e for e in entries if e.architecture in fitting], fitting)
    if entry is None:
        raise SepMEError(f"There is no delta of {name[:60]!r} for this checkpoint in {host.library.folder}.")
    if other := next((e for e in chosen if normalised(e.concept) == normalised(entry.concept)), None):
        raise SepMEError(f"It is another file than {with_hash(other)!r}, which is chosen already; only one of a concept can be on.")
    return entry


class SepMEScript(host.Script):
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
            entries = host.library.entries()
            settings = _override(p, Settings.parse(*args), entries)
            chosen = _panel_entries(p, settings, entries)
            if settings.enabled:
                strengths, idle = by_concept(settings.strengths, chosen, entries)
                settings = replace(settings, strengths=strengths)
                if idle and getattr(p, "is_api", False):  # the page keeps strengths of concepts that are chosen again later
                    say(p, f"the strength of {', '.join(idle)[:200]} has no effect, since it is not chosen.")
            p.sepme_run = Generation(settings, chosen)
            _record(p, p.sepme_run)
            _check_encoder(p, [load(e) for e in chosen])  # while the host has its text encoder at hand; said when a batch is drawn
        except SepMEError as error:
            say(p, f"nothing is erased. {error}")

    def before_process_batch(self, p: Any, *args: Any, prompts: list[str], **kwargs: Any) -> None:
        """Take the tags out of prompts and negative prompts, before the host reads its own tags and encodes them."""
        run: Generation | None = getattr(p, "sepme_run", None)
        prompts[:], positive = _taken(p, prompts)
        p.negative_prompts[:], negative = _taken(p, p.negative_prompts)
        hires = self._take_hires_tags(p, len(prompts)) if getattr(p, "enable_hr", False) else None
        if run is not None:
            run.batch = BatchTags(positive, negative, hires)

    def _take_hires_tags(self, p: Any, count: int) -> tuple[list[Tags], list[Tags]]:
        """The hires pass has prompts of its own, by default the same. The host cuts them into batches after this, and writes the whole
        lists into the infotext: until then they are others."""
        start = p.iteration * p.batch_size
        part = slice(start, start + count)
        p.sepme_hires = (p.all_hr_prompts, p.all_hr_negative_prompts)
        p.all_hr_prompts, p.all_hr_negative_prompts = list(p.all_hr_prompts), list(p.all_hr_negative_prompts)
        p.all_hr_prompts[part], positive = _taken(p, p.all_hr_prompts[part])
        p.all_hr_negative_prompts[part], negative = _taken(p, p.all_hr_negative_prompts[part])
        return positive, negative

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """The host has cut the hires prompts: it gets its lists back."""
        if getattr(p, "sepme_hires", None) is not None:
            p.all_hr_prompts, p.all_hr_negative_prompts = p.sepme_hires
            p.sepme_hires = None

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Attach anew for every pass; the Forges throw earlier patches away, and call this twice for hires."""
        run: Generation | None = getattr(p, "sepme_run", None)
        if run is not None:
            _attach(p, run)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _release()

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        _release()


def _record(p: Any, run: Generation) -> None:
    """Write what is on into the infotext: the panel's deltas with strengths, and which files the prompts' tags mean."""
    texts = [*p.all_prompts, *p.all_negative_prompts]
    if getattr(p, "enable_hr", False):  # those of the hires pass are None without it
        texts += [*p.all_hr_prompts, *p.all_hr_negative_prompts]
    tags = merge(*take_tags(list(dict.fromkeys(texts)))[1])
    named = {}
    for name, strength in tags.items():
        with suppress(SepMEError):  # said when the batch is sampled
            named[_for_tag(p, name, run.chosen)] = strength
    for key, strengths in ((infotext.TAGS, {e: s for e, s in named.items() if e not in run.chosen}), (infotext.CONCEPTS, run.strengths)):
        if strengths:
            p.extra_generation_params[key] = infotext.write([infotext.Record(e.concept, e.content_hash, s) for e, s in strengths.items()])
    odd = sorted({e.concept for e, s in (*named.items(), *run.strengths.items()) if not 0 <= s <= 1})
    if odd:
        say(p, f"the strength of {', '.join(odd)} lies outside 0 to 1; negative ones amplify, larger ones overshoot.")
    if not run.settings.gate:
        p.extra_generation_params[infotext.GATE] = "off"


def add_tags(p: Any, tags: Mapping[str, float]) -> None:
    """Tags that another extension wrote into the prompts after ours were read: for every prompt of the batch."""
    run: Generation | None = getattr(p, "sepme_run", None)
    if run is not None and run.batch is not None and tags:
        run.batch.positive = [merge(tags, row) for row in run.batch.positive]


def _override(p: Any, settings: Settings, entries: Sequence[Entry]) -> Settings:
    """What an X/Y/Z plot asks for, instead of the panel's.

    Raises:
        SepMEError: a strength that is none.
    """
    concepts, strength = getattr(p, "sepme_concepts", None), getattr(p, "sepme_strength", None)
    if concepts is not None:
        wanted = () if means_none(concepts, entries) else tuple(dict.fromkeys(concepts))
        settings = replace(settings, enabled=bool(wanted), concepts=wanted)
    if strength is not None:
        check_number("SepME strength", strength, -100, 100)
        settings = replace(settings, enabled=True, overall=strength)
    return settings


def _panel_entries(p: Any, settings: Settings, entries: Sequence[Entry]) -> list[Entry]:
    """Files of the concepts chosen in the panel.

    Raises:
        SepMEError: there is none of a name, or several; or two files erase one concept.
    """
    chosen: dict[str, Entry] = {}
    for name in settings.concepts if settings.enabled else ():
        entry = choose(name, entries, host.architectures_of(p.sd_model))
        if entry is None:
            raise SepMEError(
                f"There is no delta {name[:60]!r} for this checkpoint in {host.library.folder}; put its file there and refresh."
            )
        load(entry)
        chosen[entry.content_hash] = entry
    if len({normalised(e.concept) for e in chosen.values()}) < len(chosen):
        raise SepMEError("Two of the chosen files erase the same concept; choose one of them.")
    return list(chosen.values())


def _taken(p: Any, prompts: Sequence[str]) -> tuple[list[str], list[Tags]]:
    """Prompts without tags, and the tags of each; what cannot be read is said."""
    texts, tags, wrong = take_tags(prompts)
    for sentence in wrong:
        say(p, f"the tags of a prompt are left out. {sentence}")
    return texts, tags
