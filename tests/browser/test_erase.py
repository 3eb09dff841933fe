"""SepME Erase on the page: from an empty graph and a checkpoint to the first pair of pictures; rows by keyboard, presets, the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from comfyui.conftest import NAME
from comfyui.server import Server
from playwright.sync_api import Error, Locator, expect

from browser.page import Page
from browser.test_first_use import pixels
from browser.test_templates import check_layout, shrink

pytestmark = pytest.mark.xdist_group("browser")

CLICKS = 6  # as the README says
TEMPLATE = "0_quick_erase_on_your_checkpoint"


def rows(page: Page, node: str) -> Any:
    return json.loads(page.value(node, "concepts"))


def field(page: Page, node: str) -> Locator:
    found: Locator = page.panel(node).locator(".sepme-foot input")
    return found


def test_rows(page: Page) -> None:
    """Typed, chosen, switched, weighed, removed; the value is what the server reads."""
    erase = page.add("SepMEErase", 300, 140)
    page.wire(page.add("SepMEDemoModel", 60, 140), 0, erase, "model")
    expect(page.panel(erase)).to_contain_text("Type what must not be in the pictures")
    field(page, erase).click()
    page.tab.keyboard.type("tulip, blue star")
    page.tab.keyboard.press("Enter")
    page.wait_rows(erase, "tulip", "blue star")
    assert rows(page, erase) == [{"name": "tulip"}, {"name": "blue star"}]
    page.switch(erase, "tulip")
    number = page.row(erase, "blue star").locator(".sepme-number")
    number.fill("0.4")
    number.press("Enter")
    assert rows(page, erase) == [{"name": "tulip", "on": False}, {"name": "blue star", "strength": 0.4}]
    field(page, erase).click()
    page.tab.keyboard.type("nud")
    page.tab.locator(".sepme-choices li").first.click()
    page.wait_rows(erase, "tulip", "blue star", "nudity")
    assert len(rows(page, erase)[2]["prompts"]) > 10
    assert rows(page, erase)[2]["anchor"] == "a person wearing clothes"
    page.tab.keyboard.type("gogh")
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Enter")
    page.wait_rows(erase, "tulip", "blue star", "nudity", "van gogh")
    assert rows(page, erase)[3] == {"name": "van gogh", "anchor": "a painting"}
    page.tab.keyboard.press("Escape")
    page.row(erase, "nudity").locator(".sepme-drop").click()
    page.row(erase, "tulip").locator(".sepme-drop").click()
    page.wait_rows(erase, "blue star", "van gogh")
    page.row(erase, "blue star").locator(".sepme-anchor").click()
    dialog = page.dialog("What takes the place of blue star?")
    dialog.locator("input[type=text]").fill("a blue church")
    dialog.locator("input[type=text]").press("Enter")
    expect(page.row(erase, "blue star")).to_contain_text("→ a blue church")
    for choice, shown, anchor in (("nothing in particular", "→ nothing in particular", {"anchor": ""}), ("Found by itself", "→ …", {})):
        page.row(erase, "van gogh").locator(".sepme-anchor").click()
        dialog = page.dialog("What takes the place of van gogh?")
        dialog.locator(f"label:has-text('{choice}')").click()
        dialog.locator(".sepme-stay").fill("monet\nsunflowers")
        page.answer("What takes the place of van gogh?", "OK")
        expect(page.row(erase, "van gogh")).to_contain_text(shown)
        assert rows(page, erase)[1] == {"name": "van gogh"} | anchor
    assert page.value(erase, "preserve") == "monet\nsunflowers"
    saved = page.workflow()
    page.load_workflow(saved)
    page.wait_rows(erase, "blue star", "van gogh")
    assert rows(page, erase)[0] == {"name": "blue star", "strength": 0.4, "anchor": "a blue church"}


def test_saved_concepts_by_search_and_from_the_sidebar(page: Page) -> None:
    erase = page.add("SepMEErase", 460, 140)
    page.wire(page.add("SepMEDemoModel", 60, 600), 0, erase, "model")
    field(page, erase).click()
    page.tab.keyboard.type("openmoji")
    page.tab.locator(".sepme-choices li:has-text('saved')").click()
    page.wait_rows(erase, "openmoji")
    page.tab.keyboard.press("Escape")
    page.open_concepts()
    page.tab.click(".sepme-delta:has(b:text-is('tulip')) summary")
    page.tab.click(".sepme-delta:has(b:text-is('tulip')) button:text-is('Add to graph')")
    page.wait_rows(erase, "openmoji", "tulip")
    at = page.tab.evaluate("(id) => app.canvasPosToClientPos([sepmeTest.node(id).pos[0] + 200, sepmeTest.node(id).pos[1] - 14])", erase)
    entry = page.tab.locator(".sepme-delta:has(b:text-is('star')) summary")
    entry.drag_to(page.tab.locator("body"), target_position={"x": at[0], "y": at[1]})
    page.wait_rows(erase, "openmoji", "tulip", "star")
    page.row(erase, "star").locator(".sepme-drop").click()
    assert page.ids("SepMELoadDelta") == []
    assert [(r["file"], len(r["content_hash"])) for r in rows(page, erase)] == [("openmoji.safetensors", 64), ("tulip.safetensors", 64)]


def test_rows_whose_file_is_missing_are_repaired(page: Page) -> None:
    title, gone = (
        "Missing concept deltas",
        [{"name": name, "file": f"gone-{name}.safetensors", "content_hash": "0" * 64} for name in ("star", "tulip")],
    )
    erase = page.add("SepMEErase", 300, 140, concepts=json.dumps(gone))
    page.look()
    page.row(erase, "star").locator("button:text-is('Repair…')").click()
    dialog = page.dialog(title)
    expect(dialog.locator(".sepme-missing")).to_have_count(2)
    dialog.locator("text=Use another delta of this concept: star.safetensors").click()
    expect(dialog.locator(".sepme-missing")).to_have_count(1)
    assert rows(page, erase)[0]["file"] == "star.safetensors"
    dialog.locator("text=Work it out anew from its name").click()
    expect(dialog).to_have_count(0)
    assert rows(page, erase)[1] == {"name": "tulip"}
    page.load_workflow(
        json.loads(
            json.dumps(page.workflow())
            .replace("star.safetensors", "gone.safetensors")
            .replace(rows(page, erase)[0]["content_hash"], "1" * 64)
        )
    )
    expect(page.dialog(title).locator(".sepme-missing")).to_have_count(1)  # asked when it is opened
    page.answer(title, "Close")


def drawn(page: Page) -> str:
    """A star that SepME Erase erases and a tag keeps, sampled once; the node's id."""
    erase, model = page.add("SepMEErase", 460, 60, concepts='[{"name": "star"}]'), page.add("SepMEDemoModel", 60, 60)
    text, sampler = page.add("CLIPTextEncode", 60, 250, text="a star <keep:star>"), page.add("KSampler", 860, 60, steps=4)
    empty, latent = page.add("CLIPTextEncode", 60, 500), page.add("EmptyLatentImage", 460, 500, width=64, height=64)
    decoded, shown = page.add("VAEDecode", 860, 500), page.add("PreviewImage", 1180, 60)
    for source, output, target, name in (
        (model, 0, erase, "model"), (model, 1, erase, "clip"), (model, 1, text, "clip"), (model, 1, empty, "clip"),
        (erase, 0, sampler, "model"), (text, 0, sampler, "positive"), (empty, 0, sampler, "negative"), (latent, 0, sampler, "latent_image"),
        (sampler, 0, decoded, "samples"), (model, 2, decoded, "vae"), (decoded, 0, shown, "images"),
    ):  # fmt: skip
        page.wire(source, output, target, name)
    page.queue()
    return erase


def test_what_was_found_is_shown_and_tags_know_the_rows(page: Page) -> None:
    erase = drawn(page)
    row = page.row(erase, "star")
    expect(row).to_contain_text("→ a picture")
    expect(row.locator(".sepme-dot")).to_have_class("sepme-dot sepme-poor")
    expect(page.panel(erase).locator(".sepme-sentence")).to_have_text("star: 3 of 11 prompts with it slip through, as banana, a star")
    row.locator(".sepme-anchor").click()
    dialog = page.dialog("What takes the place of star?")
    near = dialog.locator(".sepme-near").input_value().split(", ")
    assert near[:2] == ["crescent", "moon"]
    dialog.locator(".sepme-near").fill(", ".join([*near[2:], "Sofa"]))
    same = dialog.locator(".sepme-same")
    same.fill(f"{same.input_value()}, moon")
    page.answer("What takes the place of star?", "OK")
    assert rows(page, erase) == [{"name": "star", "stays": ["sofa"], "same": ["moon"], "free": ["crescent"]}]
    row.locator(".sepme-drop").click()
    done = page.run()
    assert done["kind"] == "execution_error"
    assert "no concept" in done["exception_message"].lower()


class Counted:
    """Clicks of a user, counted."""

    def __init__(self, page: Page) -> None:
        self.page, self.clicks = page, 0

    def click(self, target: Any) -> None:
        target.click()
        self.clicks += 1
        self.page.frames()


def open_template(user: Counted) -> None:
    user.click(user.page.tab.locator(".templates-tab-button"))
    user.click(user.page.tab.locator(f"h3[title='{TEMPLATE}']"))


def choose_checkpoint(user: Counted, loader: str) -> None:
    """The one that there is, from the list of the loader."""
    page, tab = user.page, user.page.tab
    if page.vue:
        user.click(tab.locator(f"[data-node-id='{loader}'] [role='combobox']").first)
        user.click(tab.locator("[role='option']:visible", has_text=NAME))
    else:
        middle = "[n.pos[0] + 165, n.pos[1] + n.widgets[0].last_y + 10]"
        at = tab.evaluate(f"(id) => {{ const n = sepmeTest.node(id); return app.canvasPosToClientPos({middle}); }}", loader)
        entry = tab.locator(".litemenu-entry", has_text=NAME)
        for _ in range(5):  # a frame that is late can swallow a press
            tab.mouse.click(*at)
            with suppress(Error):
                entry.wait_for(timeout=5000)
                break
        user.clicks += 1
        user.click(entry)
    page.sees(lambda: page.value(loader, "ckpt_name"), NAME)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_first_pair(checkpoint_server: Server, open_page: Callable[..., Page], vue: bool) -> None:
    """From an empty graph to a picture before and after, in a few clicks; nothing is typed but the concept's name."""
    page = open_page(checkpoint_server, vue=vue, size=(1500, 950))
    user, tab = Counted(page), page.tab
    open_template(user)
    page.sees(lambda: len(page.ids("SepMEErase")), 1)
    shrink(page)
    (erase,), (loader,) = page.ids("SepMEErase"), page.ids("CheckpointLoaderSimple")
    choose_checkpoint(user, loader)
    user.click(field(page, erase))
    tab.keyboard.type("van gogh")
    tab.keyboard.press("Enter")
    page.wait_rows(erase, "van gogh")
    user.clicks += 1  # Run
    ((shown,),) = (out["sepme_compare"] for out in page.queue().values() if "sepme_compare" in out)
    assert not np.array_equal(*(pixels(checkpoint_server, shown[name][0]) for name in ("before", "after")))
    (compare,) = page.ids("SepMECompare")
    page.sees(lambda: page.part(compare, "sepmeCompare").locator(".sepme-after").evaluate("(i) => i.naturalWidth > 0"), True)
    assert user.clicks == CLICKS
    check_layout(page)
