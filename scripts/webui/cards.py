"""How delta files look in a list: the small picture that some hold, their name, how safely they are told apart, what they fit."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ...sepme.delta.library import Entry
from ...sepme.model.families import fits
from .files import about, find
from .grades import dot, word

BEFORE_AND_AFTER = "A prompt of it, without and with the concept erased"
LOST = "no such file; refresh, or take it out"


def picture(files: Sequence[Entry]) -> str:
    """The first small picture that any of them holds, as HTML; nothing where none does."""
    shown = next(filter(None, (about(e).thumbnail for e in files)), "")
    return f'<img class="sepme-thumbnail" src="{shown}" alt="" title="{BEFORE_AND_AFTER}">' if shown else ""


def name(label: str, files: Sequence[Entry]) -> str:
    """Picture, label and a dot per grade, as HTML."""
    return f"{picture(files)} {html.escape(label)}{''.join(f' {dot(g)}' for g in _grades(files))}"


def facts(files: Sequence[Entry], without: str = LOST) -> str:
    """How safely each is told apart in a word, what it fits and its size, as HTML."""
    grades = "".join(f"<span>{html.escape(word(g))}</span>, " for g in _grades(files))
    text = html.escape("; ".join(f"{fits(e.architecture)}, {e.bytes / 1000:.0f} kB" for e in files) or without)
    return f'<span class="sepme-facts" title="{text}">{grades}<span>{text}</span></span>'


def _grades(files: Sequence[Entry]) -> list[str]:
    return sorted({about(e).grade for e in files})


def cards(chosen: Sequence[str], entries: Sequence[Entry]) -> str:
    """What is chosen in a list, one below the other, as HTML."""
    rows = [(label, find(label, entries)) for label in chosen or ()]
    return "".join(f'<div class="sepme-card"><b>{name(label, files)}</b>{facts(files)}</div>' for label, files in rows)
