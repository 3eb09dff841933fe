"""The pictures of README and docs, taken of what the tests use. ``SEPME_PICTURES=docs/images`` keeps them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from comfyui.server import Server
from PIL import Image

from browser.page import Page
from browser.test_erase import drawn, field
from browser.test_first_use import build

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(os.environ.get("SEPME_PICTURES", tmp_path))


def check_picture(path: Path) -> None:
    """A picture that shows something, small enough for a README."""
    image = Image.open(path).convert("RGB")
    assert len(image.resize((64, 64)).getcolors(4096) or range(4096)) > 50
    image.save(path, optimize=True)
    assert path.stat().st_size < 300_000


def test_panel_sidebar_and_picture(server: Server, open_page: Callable[..., Page], folder: Path) -> None:
    page = open_page(server)
    ids = build(page)
    page.open_concepts()
    for concept in ("tulip", "openmoji"):
        page.tab.click(f".sepme-delta:has(b:text-is('{concept}')) summary")
        page.tab.click(f".sepme-delta:has(b:text-is('{concept}')) button:text-is('Add to graph')")
    page.sees(lambda: len(page.ids("SepMELoadDelta")), 3)
    page.wait_rows(ids["SepMEApply"], "star", "tulip", "openmoji")
    loaders = [str(n["id"]) for n in page.workflow()["nodes"] if n["type"] == "SepMELoadDelta"]
    places = {ids["SepMEDemoModel"]: (380, 140), ids["EmptyLatentImage"]: (380, 900), ids["SepMEApply"]: (720, 140)}
    places |= {ids["positive"]: (720, 440), ids["negative"]: (720, 610), ids["KSampler"]: (1130, 140)}
    places |= {ids["VAEDecode"]: (1130, 480), ids["SaveImage"]: (1130, 600)}
    places |= dict(zip(loaders, ((380, 270), (380, 480), (380, 690)), strict=True))
    page.tab.evaluate("(ids) => ids.forEach((id) => sepmeTest.node(id).setSize([370, 120]))", [ids["positive"], ids["negative"]])
    page.tab.evaluate("(places) => { for (const [id, at] of Object.entries(places)) sepmeTest.node(id).pos = at; }", places)
    page.wait_rows(ids["SepMEApply"], "star", "tulip", "openmoji")
    page.home()
    page.switch(ids["SepMEApply"], "tulip")
    page.queue()
    page.tab.evaluate(
        "app.canvas.deselectAll?.(); app.canvas.ds.scale = 0.8; app.canvas.ds.offset = [60, 0]; app.canvas.setDirty(true, true)"
    )
    page.picture(folder / "comfyui-page.png")
    check_picture(folder / "comfyui-page.png")


def test_erase(server: Server, open_page: Callable[..., Page], folder: Path) -> None:
    page = open_page(server)
    erase = drawn(page)
    field(page, erase).click()
    page.tab.keyboard.type("tulip, twemoji")
    page.tab.keyboard.press("Enter")
    field(page, erase).click()
    page.tab.locator(".sepme-choices li").first.wait_for()
    page.picture(folder / "comfyui-erase.png")
    check_picture(folder / "comfyui-erase.png")
    page.tab.keyboard.press("Escape")


def test_repair(server: Server, open_page: Callable[..., Page], folder: Path) -> None:
    page = open_page(server)
    names = ("van gogh", "picasso")
    hashes = [c * 64 for c in "ab"]
    nodes = [
        {"id": i, "type": "SepMELoadDelta", "pos": [300, 200 + 300 * i], "size": [300, 170], "widgets_values": [f"{name}.safetensors", h]}
        for i, (name, h) in enumerate(zip(names, hashes, strict=True))
    ]
    records = {h: {"concept": n, "prompts": [n], "train": {"objective": "gcirs"}} for n, h in zip(names, hashes, strict=True)}
    records[hashes[0]]["data"] = "AAAA"
    for node in nodes:
        node |= {"flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    page.load_workflow(
        {"nodes": nodes, "links": [], "groups": [], "version": 0.4, "last_node_id": 2, "last_link_id": 0, "extra": {"sepme": records}}
    )
    dialog = page.dialog("Missing concept deltas")
    dialog.screenshot(path=str(folder / "comfyui-repair.png"))
    check_picture(folder / "comfyui-repair.png")
    page.answer("Missing concept deltas", "Close")
