"""Training as the page shows it: loss curve and picture while it runs, certificates and heat map afterwards; completion of tags."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from browser.page import Page

pytestmark = pytest.mark.xdist_group("browser")

DRAWN = "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((value) => value)"


@pytest.mark.usefixtures("delta_folder")
def test_curve_picture_certificates(page: Page) -> None:
    model = page.add("SepMEDemoModel", 80, 120)
    book = page.add("SepMEConceptBook", 80, 300, book="concepts: [circle, {name: neon, prompts: [neon style, a neon picture]}]")
    train = page.add("SepMETrain", 460, 120, erase="circle", steps=12, seed=int(page.vue))  # other than before: not cached
    apply = page.add("SepMEApply", 880, 120)
    save = page.add("SepMESaveDeltas", 880, 420, filename_prefix="trained/")
    for source, output, target, name in (
        (model, 0, train, "model"), (model, 1, train, "clip"), (book, 0, train, "concepts"),
        (model, 0, apply, "model"), (train, 0, apply, "deltas"), (train, 0, save, "deltas"),
    ):  # fmt: skip
        page.wire(source, output, target, name)
    page.wait_rows(apply, "circle")
    assert "Not trained yet" in page.row(apply, "circle").locator(".sepme-dot").get_attribute("title")
    steps = page.tab.evaluate_handle(
        "() => { const seen = []; app.api.addEventListener('sepme.train', ({ detail }) => seen.push(detail)); return seen; }"
    )
    page.queue()
    seen = steps.json_value()
    assert [s["step"] for s in seen] == list(range(1, len(seen) + 1))
    assert seen[0]["sample"].startswith("data:image/png")
    shown = page.part(train, "sepmeTraining")
    expect(shown).to_contain_text("Deltas made: 1")
    page.sees(lambda: shown.locator("img").evaluate("(i) => i.naturalWidth"), 128)
    assert shown.locator("canvas").evaluate(DRAWN)
    cells = shown.locator(".sepme-heat td[title]")
    assert any("circle → neon" in title for title in cells.evaluate_all("(cells) => cells.map((c) => c.title)"))
    certificate = page.row(apply, "circle").locator(".sepme-dot")
    expect(certificate).to_have_attribute("title", re.compile("leakage into known prompts"))


def test_completion(page: Page) -> None:
    encode = page.add("SepMETextEncode", 300, 200)
    field(page, encode).click()
    page.tab.keyboard.type("a city <")
    choices = page.tab.locator(".sepme-completion [role=option]")
    expect(choices).to_contain_text(["erase:", "keep:"])
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("ST")
    expect(choices).to_have_text(["star", "striped"])
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Tab")
    page.sees(lambda: page.value(encode, "text"), "a city <erase:striped>")
    page.tab.keyboard.type(" <keep:he")
    expect(choices).to_have_text(["heart"])
    page.tab.keyboard.press("Escape")
    expect(choices).to_have_count(0)
    page.tab.keyboard.type("art>")
    page.sees(lambda: page.api_prompt()[encode]["inputs"]["text"], "a city <erase:striped> <keep:heart>")


def test_nothing_is_completed_elsewhere(page: Page) -> None:
    encode = page.add("CLIPTextEncode", 300, 200)
    field(page, encode).click()
    page.tab.keyboard.type("<erase:s")
    page.sees(lambda: page.value(encode, "text"), "<erase:s")
    ours = page.add("SepMETextEncode", 300, 500)  # where it is looked up, the list comes; what was asked before has been answered
    field(page, ours).click()
    page.tab.keyboard.type("<erase:st")
    expect(page.tab.locator(".sepme-completion")).to_have_count(1)
    expect(page.tab.locator(".sepme-completion [role=option]")).to_have_text(["star", "striped"])


def field(page: Page, node: str) -> Any:
    """The text of an encode node."""
    return page.tab.locator(f"[data-node-id='{node}'] textarea") if page.vue else page.text(node)
