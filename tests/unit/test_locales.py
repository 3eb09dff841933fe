"""The page's words: every language has the same keys and blanks, the scripts use no others, and the server's sentences are the server's."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = json.loads((ROOT / "locales/en/main.json").read_text(encoding="utf-8"))["sepme"]
BLANK = re.compile(r"\{\w+\}")
SERVER = json.loads((ROOT / "locales/zh/main.json").read_text(encoding="utf-8"))["sepmeServer"]
NODES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nodes").rglob("*.py"))
SHOWN = ("sepme/delta/format.py", "sepme/apply/toggles.py", *NODES)  # the page shows them in toasts and as errors of nodes
USED = re.compile(r'\bt\(\s*"([a-zA-Z.]+)"')


@pytest.mark.parametrize("language", [p.name for p in sorted((ROOT / "locales").iterdir())])
def test_languages_agree(language: str) -> None:
    own = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["sepme"]
    assert set(own) == set(ENGLISH)
    for key, text in own.items():
        assert sorted(BLANK.findall(text)) == sorted(BLANK.findall(ENGLISH[key])), key


def test_keys_are_those_that_scripts_use() -> None:
    scripts = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "web" / "js").glob("*.js"))
    rooms = "|".join(sorted({key.split(".")[0] for key in ENGLISH}))
    quoted = set(re.findall(rf'"((?:{rooms})\.[a-zA-Z]+)"', scripts))
    assert set(USED.findall(scripts)) | quoted <= set(ENGLISH)
    quoted |= {f"panel.{k}{end}" for k in re.findall(r'button\("(\w+)"', scripts) for end in ("", "Tip")}
    quoted |= {f"facts.{k}" for k in re.findall(r'fact\("(\w+)"', scripts)}
    quoted |= {f"compare.{name}" for name in ("before", "after")}
    assert {k for k in ENGLISH if k not in quoted and not k.startswith(("grade.", "completion."))} == set()  # those are put together


def sentences(file: Path) -> list[str]:
    """What a module raises, says or puts together, ``{}`` for what differs; help of nodes is translated with their definitions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    helps = (k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg in ("tooltip", "description"))
    no_error = {n for text in helps for n in ast.walk(text)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "_say"]
    calls += [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    told = {argument for call in calls for argument in call.args[:1]}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node in told:
            found.append(str(node.value))
        elif isinstance(node, ast.JoinedStr) and node not in no_error:
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
    return [s for s in found if re.match(r"[^.].* .*\.$", s, re.DOTALL) and not s.startswith("Note: ")]  # notes stand among figures


def notices(file: Path) -> list[str]:
    """Sentences that stand in a module as they are: told, not raised."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.endswith(".")]


def matches(english: str, sentence: str) -> bool:
    return re.fullmatch(re.escape(english).replace(r"\{\}", "(.*)"), sentence, re.DOTALL) is not None


@pytest.mark.parametrize("file", SHOWN)
def test_sentences_of_the_server_are_translated(file: str) -> None:
    missing = [s for s in sentences(ROOT / file) if not any(matches(e, s) for e in SERVER)]
    assert missing == []


def test_translations_are_of_sentences_that_exist() -> None:
    files = [file for folder in ("nodes", "sepme") for file in (ROOT / folder).rglob("*.py")]
    every = [s for file in files for s in (*sentences(file), *notices(file))]
    assert [e for e in SERVER if not any(matches(e, s) for s in every)] == []
    for english, chinese in SERVER.items():
        assert max(map(int, re.findall(r"\{(\d)\}", chinese)), default=0) <= english.count("{}"), english
