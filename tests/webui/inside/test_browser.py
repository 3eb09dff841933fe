"""The panel and the tab in a real Chromium: javascript/sepme.js, style.css. ``SEPME_PICTURES=docs/images`` keeps the README's pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from browser.chromium import launched

NAME = "a \"quoted\" & 'named' \\ &lt;b&gt;"
BOOK = """concepts:
  - sun
  - name: house
    prompts: [a house, a small house]
preserve: [a star]
"""


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with launched() as browser:
        yield browser


class Panel:
    """One tab's panel as a user sees it."""

    def __init__(self, tab: Any, name: str = "txt2img") -> None:
        self.tab, self.name, self.id = tab, name, f"#script_{name}_sepme_concepts"
        tab.click(f".tab-nav button:text-is('{name}')")
        tab.click(f"{self.id}_enabled .label-wrap")

    def choose(self, *concepts: str) -> None:
        for concept in concepts:
            option = self.tab.locator(f"{self.id}_concepts ul.options li", has_text=concept).first
            for _ in range(30):  # until a refresh has arrived
                self.tab.fill(f"{self.id}_concepts input", "")
                self.tab.fill(f"{self.id}_concepts input", concept)
                if option.count():
                    break
                self.tab.wait_for_timeout(200)
            option.click()
            self.row(concept).wait_for()
        self.tab.keyboard.press("Escape")

    def row(self, concept: str) -> Any:
        return self.tab.locator(f"{self.id}_rows .sepme-row[data-concept={json.dumps(concept)}]")

    def slide(self, concept: str, strength: float) -> None:
        """As a drag does it: the slider moves, and is let go."""
        self.row(concept).locator(".sepme-strength").evaluate(
            "(e, v) => { e.value = v; for (const t of ['input', 'change']) e.dispatchEvent(new Event(t, { bubbles: true })) }", strength
        )

    @property
    def strengths(self) -> dict[str, float]:
        return json.loads(self.tab.locator(f"{self.id}_strengths").locator("textarea, input").input_value() or "{}")

    def settled(self, **expected: float) -> None:
        """Wait until the rows that the server drew say so, and the field with them."""
        for concept, strength in expected.items():
            number = f"{self.id}_rows .sepme-row[data-concept={json.dumps(concept)}] .sepme-number[value='{strength:g}']"
            self.tab.wait_for_selector(number)
        assert {k: self.strengths[k] for k in expected} == expected

    def generate(self) -> tuple[float, str]:
        result = self.tab.locator(f"#{self.name}_result").locator("textarea, input")
        result.evaluate("e => e.value = ''")
        self.tab.click(f"#{self.name}_generate")
        self.tab.wait_for_function("e => e.value !== ''", arg=result.element_handle())
        return json.loads(result.input_value())["sum"], self.tab.locator(f"#{self.name}_infotext").locator("textarea, input").input_value()


@pytest.fixture
def tab(chrome: Any, page: SimpleNamespace) -> Iterator[Any]:
    opened = chrome.new_page(viewport={"width": 900, "height": 900})
    opened.set_default_timeout(30_000)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(page.url)
    opened.wait_for_selector("#txt2img_prompt")
    yield opened
    opened.close()
    assert [e for e in errors if "sepme" in e.lower()] == []


@pytest.fixture
def panel(tab: Any) -> Panel:
    opened = Panel(tab)
    opened.tab.locator("#txt2img_prompt").locator("textarea, input").fill("a star")
    return opened


def total(latents: Any) -> float:
    return float(latents.double().sum())


def test_switches_and_strengths_reach_the_picture(panel: Panel, page: SimpleNamespace) -> None:
    panel.choose("star", "moon")
    panel.slide("star", 0.5)
    panel.settled(star=0.5, moon=1)
    half = total(page.ui.erase("star", "moon", strengths='{"star": 0.5}'))
    assert panel.generate()[0] == half
    panel.row("star").locator(".sepme-switch").click()
    panel.settled(star=0, moon=1)
    assert "sepme-off" in panel.row("star").get_attribute("class")
    assert panel.generate()[0] == total(page.ui.draw(script=False)) != half
    panel.row("star").locator(".sepme-switch").click()
    panel.settled(star=0.5, moon=1)  # as it was before
    assert panel.generate()[0] == half
    panel.row("star").locator(".sepme-number").fill("-0.25")
    panel.tab.keyboard.press("Tab")
    panel.settled(star=-0.25, moon=1)
    assert panel.generate()[0] == total(page.ui.erase("star", "moon", strengths='{"star": -0.25}'))


def test_a_slider_moves_by_keys(panel: Panel) -> None:
    """Each step draws the rows anew; the focus stays."""
    panel.choose("star")
    panel.row("star").locator(".sepme-strength").focus()
    for strength in (0.95, 0.9, 0.85):
        panel.tab.keyboard.press("ArrowLeft")
        panel.settled(star=strength)
        panel.tab.wait_for_function("document.activeElement.className === 'sepme-strength'")


def test_a_pasted_infotext_restores_the_panel(panel: Panel) -> None:
    panel.choose("star", "heart")
    panel.slide("heart", 0.3)
    panel.settled(star=1, heart=0.3)
    sampled, infotext = panel.generate()
    panel.tab.reload()
    again = Panel(panel.tab)
    again.tab.locator("#txt2img_infotext").locator("textarea, input").fill(infotext)
    again.tab.locator("#txt2img_prompt").locator("textarea, input").fill("a star")
    again.tab.click("#txt2img_paste")
    again.settled(star=1, heart=0.3)
    assert again.generate()[0] == sampled


def test_the_two_tabs_do_not_mix(panel: Panel) -> None:
    panel.choose("star")
    panel.slide("star", 0.5)
    panel.settled(star=0.5)
    other = Panel(panel.tab, "img2img")
    assert other.strengths == {}
    other.choose("star")
    other.slide("star", 0.75)
    other.settled(star=0.75)
    assert panel.strengths == {"star": 0.5}


def test_names_are_text_and_files_come_and_go(panel: Panel, page: SimpleNamespace) -> None:
    ConceptDelta, Concept = page.ui.part("sepme.delta.concept_delta").ConceptDelta, page.ui.part("sepme.concepts").Concept
    star = ConceptDelta.load(next((page.models / "sepme").glob("star*.safetensors")))
    named = ConceptDelta(Concept(NAME, (NAME,)), star.down, star.up, star.scale, star.gate, star.info)
    path = page.ui.part("scripts.webui.host").library.save(named)
    try:
        panel.tab.click(f"{panel.id}_refresh")
        panel.choose(NAME)
        panel.slide(NAME, 0.5)
        panel.settled(**{NAME: 0.5})
        assert panel.strengths == {NAME: 0.5}
    finally:
        path.unlink()
    panel.tab.click(f"{panel.id}_refresh")
    panel.slide(NAME, 0.25)
    panel.tab.wait_for_selector(f"{panel.id}_rows:has-text('no such file')")


def test_training_shows_its_course_and_stops(tab: Any, page: SimpleNamespace) -> None:
    tab.click(".tab-nav button:text-is('SepME')")
    names = [f"animal {i}" for i in range(20)]  # enough for a while
    tab.click("#sepme_advanced .label-wrap")
    tab.locator("#sepme_book textarea").fill(f"concepts: {json.dumps(names)}")
    tab.click("#sepme_train")
    tab.wait_for_selector("#sepme_train_status .sepme-progress")
    tab.wait_for_selector("#sepme_train_plot polyline", state="attached", timeout=60_000)
    tab.click("#sepme_interrupt")
    tab.wait_for_selector("#sepme_train_status:has-text('Stopped')")
    tab.click("#sepme_objective input")
    tab.click("#sepme_objective ul.options li:has-text('closed-form')")
    tab.click("#sepme_train")
    tab.wait_for_selector("#sepme_train_status table")
    assert tab.locator("#sepme_train_status tr").count() == 1 + len(names)
    assert set(names) <= {entry.concept for entry in page.ui.part("scripts.webui.host").library.entries()}


def fill_row(tab: Any, row: int, **fields: str) -> None:
    for name, text in fields.items():
        tab.locator(f"#sepme_book_{name}_{row}").locator("textarea, input").fill(text)


def test_the_book_by_rows(tab: Any, page: SimpleNamespace) -> None:
    tab.click(".tab-nav button:text-is('SepME')")
    fill_row(tab, 0, name="sun by rows")
    tab.click("#sepme_book_more")
    fill_row(tab, 2, name="house by rows", prompts="a house; a small house", anchor="a tree")
    tab.locator("#sepme_book_preserve textarea").fill("a star\na moon")
    tab.click("#sepme_objective input")
    tab.click("#sepme_objective ul.options li:has-text('closed-form')")
    tab.click("#sepme_edit input")
    tab.click("#sepme_edit ul.options li:has-text('context')")
    tab.click("#sepme_train")
    tab.wait_for_selector("#sepme_train_status table")
    made = {e.concept: page.ui.part("scripts.webui.files").load(e) for e in page.ui.part("scripts.webui.host").library.entries()}
    house = made["house by rows"]
    assert (house.concept.prompts, house.concept.anchor) == (("a house", "a small house"), "a tree")
    assert list(house.preserve.prompts)[:2] == ["a star", "a moon"]
    assert all(made[f"{name} by rows"].edits_context for name in ("sun", "house"))


def save_picture(shot: Any, name: str, tmp_path: Path) -> None:
    """A picture that shows something, small enough for a README."""
    from PIL import Image

    path = tmp_path / name
    shot(path=str(path))
    image = Image.open(path).convert("RGB")
    assert len(image.resize((64, 64)).getcolors(4096)) > 30
    image.save(path, optimize=True)
    assert path.stat().st_size < 200_000
    if folder := os.environ.get("SEPME_PICTURES"):
        shutil.copy(path, folder)


@pytest.mark.skipif(gr.__version__.startswith("3."), reason="the README shows gradio 4")
def test_pictures(panel: Panel, page: SimpleNamespace, tmp_path: Path) -> None:
    panel.choose("star", "heart", "moon")
    panel.slide("heart", 0.7)
    panel.row("moon").locator(".sepme-switch").click()
    panel.settled(star=1, heart=0.7, moon=0)
    save_picture(panel.tab.locator(f"{panel.id}_enabled").screenshot, "webui-panel.png", tmp_path)
    panel.tab.click(".tab-nav button:text-is('SepME')")
    fill_row(panel.tab, 0, name="sun")
    fill_row(panel.tab, 1, name="house", prompts="a house; a small house")
    panel.tab.locator("#sepme_book_preserve textarea").fill("a star")
    panel.tab.locator("#sepme_steps input[type=number]").fill("40")
    panel.tab.click("#sepme_train")
    panel.tab.wait_for_selector("#sepme_train_status table", timeout=120_000)
    save_picture(panel.tab.locator("#sepme_tab, .tabitem:has(> div #sepme_objective)").first.screenshot, "webui-tab.png", tmp_path)
