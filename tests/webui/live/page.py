"""The page of a whole WebUI in a browser, as its user goes through it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .server import Server

SCRIPT = "#script_txt2img_sepme_concepts"
MINUTES = 60_000


class Page:
    """A page to be opened; what went wrong in ours is in ``errors``."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.server, self.errors = server, []
        self.tab = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.tab.set_default_timeout(2 * MINUTES)
        self.tab.on("pageerror", lambda e: self.errors.append(str(e)) if "sepme" in f"{e} {e.stack}".lower() else None)

    def open(self) -> None:
        self.tab.goto(self.server.url)
        self.tab.wait_for_selector("#txt2img_prompt textarea")
        self.tab.wait_for_timeout(3000)  # its own scripts run

    def leave(self) -> None:
        """An open page of Gradio keeps a processor busy."""
        self.tab.goto("about:blank")

    def go(self, name: str) -> None:
        self.tab.locator("#tabs > .tab-nav button", has_text=re.compile(f"^\\s*{re.escape(name)}\\s*$", re.IGNORECASE)).click()

    def install(self, address: str) -> str:
        """What the page says of it."""
        self.go("Extensions")
        self.tab.locator("#tabs_extensions > .tab-nav button", has_text="Install from URL").click()
        self.tab.get_by_label("URL for extension's git repository").fill(address)
        self.tab.locator("#tabs_extensions").get_by_role("button", name="Install", exact=True).last.click()
        result = self.tab.locator(
            "#extension_install_result", has_text=re.compile("Installed into|rror|already")
        ).first  # an id given twice
        result.wait_for(timeout=5 * MINUTES)
        return str(result.inner_text())

    def train(self, book: str, objective: str = "closed-form", edit: str = "layers", prefix: str = "", interrupt: bool = False) -> str:
        """The tab's last words; ``interrupt`` presses the button as soon as the bar shows."""
        self.go("SepME")
        advanced = self.tab.locator("#sepme_advanced")
        if not self.tab.locator("#sepme_book textarea").is_visible():
            advanced.locator(".label-wrap").click()
        self.tab.locator("#sepme_book textarea").fill(book)
        self.choose("#sepme_objective", objective)
        self.choose("#sepme_edit", edit)
        self.tab.locator("#sepme_prefix").locator("textarea, input").fill(prefix)
        self.tab.locator("#sepme_train").click()
        status = self.tab.locator("#sepme_train_status").first  # Gradio gives two elements the id
        status.locator(".sepme-progress").first.wait_for(state="attached")
        if interrupt:
            self.tab.locator("#sepme_interrupt").click()
        self.tab.wait_for_function(
            "() => { const s = document.querySelector('#sepme_train_status');"
            " return !s.querySelector('.sepme-progress') && s.innerText.trim() }", timeout=15 * MINUTES,
        )  # fmt: skip
        return str(status.inner_text())

    def choose(self, dropdown: str, value: str) -> None:
        self.tab.locator(f"{dropdown} input").first.click()
        self.tab.locator(f"{dropdown} ul.options li", has_text=re.compile(f"(^|\\s){re.escape(value)}\\s*$")).first.click()

    def drop(self, png: Path) -> None:
        """A picture onto the prompt field, then the button that reads what is in it."""
        self.go("txt2img")
        self.tab.locator("#txt2img_prompt_image input[type=file]").set_input_files(str(png))
        self.tab.wait_for_function("() => document.querySelector('#txt2img_prompt textarea').value.includes('Steps:')")
        self.paste()

    def paste(self, infotext: str | None = None) -> None:
        if infotext is not None:
            self.go("txt2img")
            self.tab.locator("#txt2img_prompt textarea").fill(infotext)
        self.tab.locator("#txt2img_tools #paste").click()
        self.tab.wait_for_function("() => !document.querySelector('#txt2img_prompt textarea').value.includes('Steps:')")
        self.tab.wait_for_timeout(3000)

    @property
    def rows(self) -> list[tuple[str, float]]:
        """Concepts and strengths that the accordion shows."""
        found = self.tab.locator(f"{SCRIPT}_rows .sepme-row").evaluate_all(
            "rows => rows.map(r => [r.dataset.concept, r.querySelector('.sepme-number').valueAsNumber])"
        )
        return sorted((name, strength) for name, strength in found)

    @property
    def opened(self) -> bool:
        return bool(self.tab.locator(f"{SCRIPT}_enabled-checkbox input").is_checked())

    def generate(self) -> bytes:
        """The file that the page's own button made."""
        before = set(self.server.data.glob("output*/**/*.png"))
        self.tab.locator("#txt2img_generate").click()
        for _ in range(300):
            self.tab.wait_for_timeout(500)
            new = sorted(set(self.server.data.glob("output*/txt2img-images/**/*.png")) - before)
            if new:
                self.tab.wait_for_timeout(1500)
                return new[0].read_bytes()
        raise AssertionError("no picture came")

    def text_of(self, selector: str) -> str:
        return json.dumps(self.tab.locator(selector).all_inner_texts())
