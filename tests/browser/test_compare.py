"""SepME Compare on the page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import expect

from browser.page import Page

pytestmark = pytest.mark.xdist_group("browser")


def test_two_pictures_under_a_slider(page: Page) -> None:
    """The keyboard moves it; the pictures are there again after undo."""
    model, erase = page.add("SepMEDemoModel", 60, 120), page.add("SepMEErase", 60, 280, concepts='[{"name": "star"}]')
    text, empty = page.add("CLIPTextEncode", 460, 120, text="a star"), page.add("CLIPTextEncode", 460, 400)
    latent, compare = page.add("EmptyLatentImage", 60, 700, width=64, height=64, batch_size=2), page.add("SepMECompare", 900, 120, steps=3)
    for source, output, target, name in (
        (model, 0, erase, "model"), (model, 1, erase, "clip"), (model, 1, text, "clip"), (model, 1, empty, "clip"),
        (model, 2, compare, "vae"), (erase, 0, compare, "model"), (text, 0, compare, "positive"),
        (empty, 0, compare, "negative"), (latent, 0, compare, "latent_image"),
    ):  # fmt: skip
        page.wire(source, output, target, name)
    part = page.part(compare, "sepmeCompare")
    expect(part).to_contain_text("Press Run")
    page.queue()
    for image in ("before", "after"):
        page.sees(lambda image=image: part.locator(f".sepme-{image}").evaluate("(i) => i.naturalWidth"), 64)
    assert part.locator(".sepme-stage").evaluate("(s) => s.clientHeight") > 200
    sources = part.locator("img").evaluate_all("(images) => images.map((i) => i.src)")
    assert sources[0] != sources[1]
    if (folder := os.environ.get("SEPME_PICTURES")) and not page.vue:
        page.picture(Path(folder) / "comfyui-compare.png")
    slider = part.locator("input")
    slider.focus()
    page.tab.keyboard.press("Home")
    page.sees(lambda: part.locator(".sepme-stage").evaluate("(s) => s.style.getPropertyValue('--sepme-at')"), "0%")
    part.locator("button").click()
    expect(part.locator("button")).to_contain_text("2 of 2")
    assert part.locator("img").evaluate_all("(images) => images.map((i) => i.src)") != sources
    page.load_workflow(page.workflow(), here=True)
    page.sees(lambda: page.part(compare, "sepmeCompare").locator(".sepme-before").evaluate("(i) => i.naturalWidth"), 64)
