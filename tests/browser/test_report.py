"""The reports that lie in docs/results: tables scroll in themselves, the page does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser.chromium import Chromium

pytestmark = pytest.mark.xdist_group("browser")
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def test_no_wider_than_the_window(chrome: Chromium) -> None:
    pages = sorted(RESULTS.rglob("*.html"))
    assert pages
    for width in (400, 1000):
        tab = chrome.new_page(viewport={"width": width, "height": 800})
        for page in pages:
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
        tab.close()
