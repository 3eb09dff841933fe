"""The page's words: every language has the same keys and blanks, and the scripts use no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = json.loads((ROOT / "locales/en/main.json").read_text(encoding="utf-8"))["sepme"]
BLANK = re.compile(r"\{\w+\}")
USED = re.compile(r'\bt\(\s*"([a-zA-Z.]+)"')


@pytest.mark.parametrize("language", [p.name for p in sorted((ROOT / "locales").iterdir())])
def test_languages_agree(language: str) -> None:
    own = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["sepme"]
    assert set(own) == set(ENGLISH)
    for key, text in own.items():
        assert sorted(BLANK.findall(text)) == sorted(BLANK.findall(ENGLISH[key])), key


def test_keys_are_those_that_scripts_use() -> None:
    scripts = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "web" / "js").glob("*.js"))
    quoted = set(re.findall(r'"((?:panel|grade|card|facts|sidebar|install|dialog|repair|completion|training)\.[a-zA-Z]+)"', scripts))
    assert set(USED.findall(scripts)) | quoted <= set(ENGLISH)
    quoted |= {f"panel.{k}{end}" for k in re.findall(r'button\("(\w+)"', scripts) for end in ("", "Tip")}
    quoted |= {f"facts.{k}" for k in re.findall(r'fact\("(\w+)"', scripts)}
    assert {k for k in ENGLISH if k not in quoted and not k.startswith(("grade.", "completion."))} == set()  # those are put together
