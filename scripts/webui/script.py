"""The script that the host calls around every generation: it reads panel and prompt tags, and writes the infotext."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...sepme.apply.toggles import merge
from ...sepme.checks import check_number
from ...sepme.concepts import normalised
from ...sepme.delta.library import Entry
from ...sepme.errors import SepMEError
from . import host, infotext
from .axes import means_none
from .files import Made, by_concept, choose, load
from .generation import BatchTags, Generation, attach, check_encoder, for_tag, release, say
from .panel import Panel
from .settings import Settings, Tags, take_tags


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
        release()
        p.sepme_run = None
        for key in infotext.KEYS:  # the cells of an X/Y/Z plot share them
            p.extra_generation_params.pop(key, None)
        try:
            entries = host.library.entries()
            settings = _override(p, Settings.parse(*args), entries)
            chosen = _panel_entries(p, settings, entries)
            made = _named(p, settings, chosen)
            chosen += made
            if settings.enabled:
                strengths, idle = by_concept(settings.strengths, chosen, [*entries, *made])
                settings = replace(settings, strengths=strengths)
                if idle and getattr(p, "is_api", False):  # the page keeps strengths of concepts that are chosen again later
                    say(p, f"the strength of {', '.join(idle)[:200]} has no effect, since it is not chosen.")
            p.sepme_run = Generation(settings, chosen)
            _record(p, p.sepme_run)
            check_encoder(p, [load(e) for e in chosen])  # while the host has its text encoder at hand; said when a batch is drawn
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
            attach(p, run)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        release()

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        release()


def _record(p: Any, run: Generation) -> None:
    """Write what is on into the infotext: the panel's deltas with strengths, and which files the prompts' tags mean."""
    texts = [*p.all_prompts, *p.all_negative_prompts]
    if getattr(p, "enable_hr", False):  # those of the hires pass are None without it
        texts += [*p.all_hr_prompts, *p.all_hr_negative_prompts]
    tags = merge(*take_tags(list(dict.fromkeys(texts)))[1])
    named = {}
    for name, strength in tags.items():
        with suppress(SepMEError):  # said when the batch is sampled
            named[for_tag(p, name, run.chosen)] = strength
    by_key: dict[str, dict[Entry, float]] = {
        infotext.TAGS: {e: s for e, s in named.items() if e not in run.chosen},
        infotext.CONCEPTS: {e: s for e, s in run.strengths.items() if not isinstance(e, Made)},
        infotext.NAMED: {e: s for e, s in run.strengths.items() if isinstance(e, Made)},
    }
    for key, strengths in by_key.items():
        if strengths:
            p.extra_generation_params[key] = infotext.write([infotext.Record(e.concept, e.content_hash, s) for e, s in strengths.items()])
    odd = sorted({e.concept for e, s in (*named.items(), *run.strengths.items()) if not 0 <= s <= 1})
    if odd:
        say(p, f"the strength of {', '.join(odd)} lies outside 0 to 1; negative ones amplify, larger ones overshoot.")
    if not run.settings.gate:
        p.extra_generation_params[infotext.GATE] = "off"


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


def _named(p: Any, settings: Settings, chosen: Sequence[Entry]) -> list[Entry]:
    """What is erased by its name alone, beside the files that are chosen.

    Raises:
        SepMEError: a name that is none, or one of a file that is chosen too.
    """
    names = settings.named if settings.enabled else ()
    taken = {normalised(e.concept) for e in chosen}
    for name in names:
        if normalised(name) in taken:
            raise SepMEError(f"{name[:60]!r} is typed and chosen as a file; leave it out of one of them.")
    known = sorted((load(e).concept for e in chosen), key=lambda c: c.name) if names else []
    return [Made.of(delta) for delta in host.erased(p.sd_model, names, known)] if names else []


def _taken(p: Any, prompts: Sequence[str]) -> tuple[list[str], list[Tags]]:
    """Prompts without tags, and the tags of each; what cannot be read is said."""
    texts, tags, wrong = take_tags(prompts)
    for sentence in wrong:
        say(p, f"the tags of a prompt are left out. {sentence}")
    return texts, tags
