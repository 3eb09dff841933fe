"""Training as the page shows it: loss curve and picture while it runs, certificates and heat map afterwards, also at the next visit."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from browser.page import Page

pytestmark = pytest.mark.xdist_group("browser")

PAINTED = "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((value) => value)"


@pytest.mark.usefixtures("delta_folder")
def test_curve_picture_certificates(page: Page) -> None:
    model = page.add("SepMEDemoModel", 80, 120)
    book = page.add("SepMEConceptBook", 80, 300, book="concepts: [church, {name: twemoji, prompts: [twemoji style, a twemoji picture]}]")
    train = page.add("SepMETrain", 460, 120, erase="church", steps=12, seed=int(page.vue), nearby=0)  # other than before: not cached
    apply = page.add("SepMEApply", 880, 120)
    save = page.add("SepMESaveDeltas", 880, 420, filename_prefix="trained/")
    for source, output, target, name in (
        (model, 0, train, "model"), (model, 1, train, "clip"), (book, 0, train, "concepts"),
        (model, 0, apply, "model"), (train, 0, apply, "deltas"), (train, 0, save, "deltas"),
    ):  # fmt: skip
        page.wire(source, output, target, name)
    page.wait_rows(apply, "church")
    assert "Not made yet" in page.row(apply, "church").locator(".sepme-dot").get_attribute("title")
    steps = page.tab.evaluate_handle(
        "() => { const seen = []; app.api.addEventListener('sepme.train', ({ detail }) => seen.push(detail)); return seen; }"
    )
    page.queue()
    told, *seen = steps.json_value()
    assert told["note"].startswith("Training by gcirs on 4 pictures of 128 x 128 pixels takes about ")
    assert [s["step"] for s in seen] == list(range(1, len(seen) + 1))
    assert seen[0]["sample"].startswith("data:image/png")
    shown = page.part(train, "sepmeTraining")
    expect(shown).to_contain_text("Deltas made: 1")
    page.sees(lambda: shown.locator("img").evaluate("(i) => i.naturalWidth"), 128)
    assert shown.locator("canvas").evaluate(PAINTED)
    cells = shown.locator(".sepme-heat td[title]")
    assert any("church → twemoji" in title for title in cells.evaluate_all("(cells) => cells.map((c) => c.title)"))
    certificate = page.row(apply, "church").locator(".sepme-dot")
    expect(certificate).to_have_attribute("title", re.compile("leakage 0"))
    page.sees(lambda: shown.locator(".sepme-result").evaluate("(e) => e.scrollHeight - e.clientHeight"), 0)
    page.sees(lambda: shown.evaluate("(e) => e.scrollHeight - e.clientHeight"), 0)  # nothing is cut off
    ends = shown.locator(".sepme-result .sepme-line").evaluate_all("(es) => es.map((e) => e.getBoundingClientRect().bottom)")
    if not page.vue:  # in Nodes 2.0 the page itself lays out nodes
        end = page.tab.evaluate(
            "(id) => { const n = sepmeTest.node(id); return app.canvasPosToClientPos([0, n.pos[1] + n.size[1]])[1]; }", train
        )
        assert max(ends) <= end + 1
    workflow = page.workflow()
    page.load_workflow(workflow, here=True)  # as undo does
    again = page.part(train, "sepmeTraining")
    expect(again).to_contain_text("Deltas made: 1")
    page.load()  # the page again: the server runs nothing again
    page.load_workflow(workflow)
    again = page.part(train, "sepmeTraining")
    expect(again).to_contain_text("Deltas made: 1")
    page.queue()
    expect(again).to_contain_text("Deltas made: 1")
    cells = again.locator(".sepme-heat td[title]")
    assert any("church → twemoji" in title for title in cells.evaluate_all("(cells) => cells.map((c) => c.title)"))
    expect(page.row(apply, "church").locator(".sepme-dot")).to_have_attribute("title", re.compile("leakage 0"))
