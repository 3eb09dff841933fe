"""Training as the page shows it: loss curve and picture while it runs, certificates and heat map afterwards; completion of tags."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.page import Page
from comfyui.server import Server

pytestmark = pytest.mark.xdist_group("browser")


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
    assert "Not trained yet" in page.row(apply, "circle").query_selector(".sepme-dot").get_attribute("title")
    steps = page.tab.evaluate_handle(
        "() => { const seen = []; app.api.addEventListener('sepme.train', ({ detail }) => seen.push(detail)); return seen; }"
    )
    page.queue()
    seen = steps.json_value()
    assert [s["step"] for s in seen] == list(range(1, len(seen) + 1))
    assert seen[0]["sample"].startswith("data:image/png")
    shown = page.tab.evaluate_handle("(id) => sepmeTest.node(id).sepmeTraining.element", train).as_element()
    assert "1 deltas made" in shown.inner_text()
    assert shown.query_selector("img").evaluate("(i) => i.naturalWidth") == 128
    drawn = "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((value) => value)"
    assert shown.query_selector("canvas").evaluate(drawn)
    cells = shown.query_selector_all(".sepme-heat td[title]")
    assert any("circle → neon" in c.get_attribute("title") for c in cells)
    page.tab.wait_for_function("(id) => !sepmeTest.node(id).sepmePanel.element.querySelector('.sepme-unknown')", arg=apply)
    assert "leakage into known prompts" in page.row(apply, "circle").query_selector(".sepme-dot").get_attribute("title")


def test_completion(page: Page) -> None:
    encode = page.add("SepMETextEncode", 300, 200)
    page.settle(400)
    if page.vue:
        field = page.tab.wait_for_selector(f"[data-node-id='{encode}'] textarea")
    else:
        field = page.tab.evaluate_handle("(id) => sepmeTest.node(id).widgets[0].element", encode).as_element()
    field.click()
    page.tab.keyboard.type("a city <")
    choices = ".sepme-completion [role=option]"
    page.tab.wait_for_selector(choices)
    assert [c.inner_text().split()[0] for c in page.tab.query_selector_all(choices)] == ["erase:", "keep:"]
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("ST")
    page.tab.wait_for_function("(c) => document.querySelectorAll(c).length === 2", arg=choices)
    assert [c.inner_text() for c in page.tab.query_selector_all(choices)] == ["star", "striped"]
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Tab")
    page.settle()
    assert page.value(encode, "text") == "a city <erase:striped>"
    page.tab.keyboard.type(" <keep:he")
    page.tab.wait_for_selector(choices)
    page.tab.keyboard.press("Escape")
    assert page.tab.query_selector(choices) is None
    page.tab.keyboard.type("art>")
    page.settle()
    assert page.api_prompt()[encode]["inputs"]["text"] == "a city <erase:striped> <keep:heart>"


def test_nothing_is_completed_elsewhere(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    encode = page.add("CLIPTextEncode", 300, 200)
    page.settle(400)
    page.tab.evaluate_handle("(id) => sepmeTest.node(id).widgets[0].element", encode).as_element().click()
    page.tab.keyboard.type("<erase:s")
    page.settle(500)
    assert page.tab.query_selector(".sepme-completion") is None
