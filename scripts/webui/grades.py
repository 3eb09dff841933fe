"""How safely a concept is told apart, in the words that ComfyUI shows."""

from __future__ import annotations

import html
import json
from pathlib import Path

_LOCALE = Path(__file__).resolve().parents[2] / "locales" / "en" / "main.json"
WORDS: dict[str, str] = json.loads(_LOCALE.read_text(encoding="utf-8"))["sepme"]


def sentence(grade: str) -> str:
    return WORDS[f"grade.{grade}"]


def word(grade: str) -> str:
    return sentence(grade).partition(":")[0]


def dot(grade: str) -> str:
    """A coloured dot as HTML; the sentence is its tooltip."""
    text = html.escape(sentence(grade), quote=True)
    return f'<span class="sepme-dot sepme-{grade}" role="img" title="{text}" aria-label="{text}"></span>'
