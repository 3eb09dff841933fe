"""The reports that lie in docs/results: tables scroll in themselves, the page does not."""

from __future__ import annotations

from pathlib import Path

from browser.chromium import launched

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def test_no_wider_than_the_window() -> None:
    pages = sorted(RESULTS.rglob("*.html"))
    assert pages
    with launched() as browser:
        for width in (400, 1000):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            for page in pages:
                tab.goto(page.as_uri())
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
            tab.close()
