"""The page's words: the same keys in every language, and sentences of the server that are really the server's."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHINESE = json.loads((ROOT / "locales/zh/main.json").read_text(encoding="utf-8"))
ENGLISH = json.loads((ROOT / "locales/en/main.json").read_text(encoding="utf-8"))
SHOWN = ("nodes/shelf.py", "nodes/routes.py", "sepme/delta/format.py")  # what the page shows in a toast comes from here


def sentences(file: Path) -> list[str]:
    """What a module raises, ``{}`` for what differs."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = node.exc.args[0]
            if isinstance(text, ast.Constant):
                found.append(str(text.value))
            elif isinstance(text, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in text.values))
    return [s for s in found if s.endswith(".")]


def matches(english: str, sentence: str) -> bool:
    return re.fullmatch(re.escape(english).replace(r"\{\}", "(.*)"), sentence, re.DOTALL) is not None


def test_every_language_has_every_word() -> None:
    assert list(CHINESE["sepme"]) == list(ENGLISH["sepme"])
    for key, text in ENGLISH["sepme"].items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", CHINESE["sepme"][key])), key


@pytest.mark.parametrize("file", SHOWN)
def test_sentences_of_the_server_are_translated(file: str) -> None:
    missing = [s for s in sentences(ROOT / file) if not any(matches(e, s) for e in CHINESE["sepmeServer"])]
    assert missing == []


def test_translations_are_of_sentences_that_exist() -> None:
    every = [s for folder in ("nodes", "sepme") for file in (ROOT / folder).rglob("*.py") for s in sentences(file)]
    assert [e for e in CHINESE["sepmeServer"] if not any(matches(e, s) for s in every)] == []
    for english, chinese in CHINESE["sepmeServer"].items():
        assert max(map(int, re.findall(r"\{(\d)\}", chinese)), default=0) <= english.count("{}"), english
