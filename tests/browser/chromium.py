"""A Chromium for the browser tests: the system's. ``python tests/browser/chromium.py`` installs it where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class Chromium:
    """The browser, as Playwright drives it: started when it is needed, and once more should it have gone."""

    def __init__(self, playwright: Any, path: str) -> None:
        self.playwright, self.path, self.starts = playwright, path, 0
        self.browser: Any = None

    def new_context(self, **options: Any) -> Any:
        if self.browser is None or not self.browser.is_connected():
            self.starts += 1
            if self.starts > 2:
                raise RuntimeError("Chromium has gone twice.")
            self.browser = self.playwright.chromium.launch(executable_path=self.path, args=FLAGS)
        return self.browser.new_context(**options)

    def new_page(self, **options: Any) -> Any:
        return self.new_context(**options).new_page()

    @contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """Kill the browser should the block take longer: a page that does not answer would be waited for without end."""
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self) -> None:
        import psutil

        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "chrom" in process.name():
                    process.kill()

    def close(self) -> None:
        if self.browser is not None:
            self.browser.close()


@contextmanager
def launched() -> Iterator[Chromium]:
    """A browser; where none is installed the test is skipped, on CI it fails."""
    import pytest

    path = chromium()
    if path is None:
        message = "Chromium is not installed; apt-get install chromium, or set SEPME_CHROMIUM to one"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = Chromium(playwright, path)
        yield browser
        browser.close()


if __name__ == "__main__":
    install()
    print(chromium() or "no Chromium: the browser tests will be skipped")
