"""A Chromium for the browser tests: the system's. ``python tests/browser/chromium.py`` installs it where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def chromium() -> str | None:
    """Its path; None where there is none."""
    return os.environ.get("SEPME_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def install() -> None:
    """By apt, as root; elsewhere the tests say how."""
    if chromium() is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-q"], check=False)
        subprocess.run(["apt-get", "install", "-qy", "--no-install-recommends", "chromium"], check=False)


@contextmanager
def launched() -> Iterator[Any]:
    """The browser, as Playwright drives it; where there is none the test is skipped, on CI it fails."""
    import pytest

    path = chromium()
    if path is None:
        message = "Chromium is not installed; apt-get install chromium, or set SEPME_CHROMIUM to one"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


if __name__ == "__main__":
    install()
    print(chromium() or "no Chromium: the browser tests will be skipped")
