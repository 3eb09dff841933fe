"""The sidebar tab: listed, filtered, dragged into the graph, installed, renamed, deleted; what other sites may not do; Chinese."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui.server import Server
from playwright.sync_api import expect

from browser.page import Page
from browser.test_panel import LAYERS
from sepme.delta.concept_delta import ConceptDelta

pytestmark = pytest.mark.xdist_group("browser")


def wait_shown(page: Page, *concepts: str) -> None:
    expect(page.tab.locator(".sepme-sidebar summary b")).to_have_text(list(concepts))


def item(page: Page, name: str) -> Any:
    """A delta of the list, opened."""
    found = page.tab.locator(f".sepme-delta[data-name='{name}']")
    if found.get_attribute("open") is None:
        found.locator("summary").click()
    return found


def test_lists_and_filters(page: Page) -> None:
    sidebar = page.open_concepts()
    wait_shown(page, "openmoji", "star", "tulip")
    search = sidebar.locator(".sepme-search")
    search.fill("drawing of a star")
    wait_shown(page, "star")
    facts = item(page, "star.safetensors").locator("dl")
    for fact in ("star.safetensors", "unet-384x7", "closed-form", "a picture of a star"):
        expect(facts).to_contain_text(fact)
    summary = item(page, "star.safetensors").locator("summary")
    expect(summary).to_contain_text(["star.safetensors"])
    page.sees(lambda: summary.locator("img").evaluate("(i) => [i.naturalWidth, i.naturalHeight]"), [256, 128])  # without, with
    search.fill("")
    wait_shown(page, "openmoji", "star", "tulip")


def test_order_copies_and_what_fits(page: Page, delta_folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    sidebar = page.open_concepts()
    make_random_delta("oak", LAYERS, seed=2).save(delta_folder / "a.safetensors")
    for name, date in (("openmoji", 300), ("star", 200), ("tulip", 400), ("a", 100)):
        os.utime(delta_folder / f"{name}.safetensors", (date, date))
    shutil.copy(delta_folder / "star.safetensors", delta_folder / "twin.safetensors")
    sidebar.locator(".pi-refresh").click()
    wait_shown(page, "oak", "openmoji", "star", "tulip")
    expect(item(page, "star.safetensors").locator("summary")).to_contain_text("copies: 1")
    order = sidebar.locator("select")
    order.select_option(label="Newest first")
    wait_shown(page, "tulip", "openmoji", "star", "oak")
    order.select_option(label="By concept")
    wait_shown(page, "oak", "openmoji", "star", "tulip")
    fits = sidebar.locator("input[type=checkbox]")
    fits.check()
    wait_shown(page, "oak", "openmoji", "star", "tulip")  # no checkpoint is loaded
    page.add("SepMEDemoModel")
    page.look()
    fits.uncheck()
    fits.check()
    wait_shown(page, "openmoji", "star", "tulip")
    fits.uncheck()
    order.select_option(label="By file")


def test_dragging_makes_wired_loaders(page: Page) -> None:
    page.open_concepts()
    apply = page.add("SepMEApply", 800, 200)
    for i, concept in enumerate(("star", "openmoji")):
        entry = page.tab.locator(f".sepme-delta:has(b:text-is('{concept}')) summary")
        entry.drag_to(page.tab.locator("#graph-canvas"), target_position={"x": 700, "y": 400 + 250 * i})
        page.wait_rows(apply, *("star", "openmoji")[: i + 1])
    loaders = [n for n in page.workflow()["nodes"] if n["type"] == "SepMELoadDelta"]
    assert {n["widgets_values"][0] for n in loaders} == {"star.safetensors", "openmoji.safetensors"}
    assert all(len(n["widgets_values"][1]) == 64 for n in loaders)
    assert len(page.ids()) == 3


def test_install_rename_delete(page: Page, delta_folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    page.open_concepts()
    tree, oak = make_random_delta("tree", LAYERS).to_bytes(), make_random_delta("oak", LAYERS, seed=1).to_bytes()
    copy, mine = delta_folder / "copy.safetensors", delta_folder / "styles" / "mine.safetensors"
    page.drop_file("copy.safetensors", (delta_folder / "star.safetensors").read_bytes(), ".sepme-sidebar")
    page.wait_toast("star.safetensors")
    wait_shown(page, "openmoji", "star", "tulip")  # it is there already
    assert not copy.exists()
    page.drop_file("copy.safetensors", tree, ".sepme-sidebar")
    wait_shown(page, "tree", "openmoji", "star", "tulip")
    assert copy.read_bytes() == tree
    for button, content in (("Close", tree), ("Replace", oak)):  # another file has the name: only replaced when told to
        page.drop_file("copy.safetensors", oak, ".sepme-sidebar")
        page.answer("Replace the file?", button)
        page.sees(copy.read_bytes, content)
    page.drop_file("evil.safetensors", b"no delta", ".sepme-sidebar")
    page.wait_toast("evil.safetensors is not installed")
    assert sorted(p.stem for p in delta_folder.iterdir() if p.is_file()) == ["copy", "openmoji", "star", "tulip"]

    item(page, "copy.safetensors").locator("button:text-is('Rename')").click()
    page.tab.fill("dialog[open] input", "../mine")
    page.answer("Rename", "OK")
    page.wait_toast("Not renamed")
    item(page, "copy.safetensors").locator("button:text-is('Rename')").click()
    page.tab.fill("dialog[open] input", "styles/mine")
    page.tab.keyboard.press("Enter")
    page.sees(mine.exists, True)
    for button, stays in (("Close", True), ("Delete", False)):
        item(page, "styles/mine.safetensors").locator("button:text-is('Delete')").click()
        page.answer("Delete the delta of oak?", button)
        page.sees(mine.exists, stays)
    wait_shown(page, "openmoji", "star", "tulip")


def test_deltas_dropped_on_the_graph(page: Page, delta_folder: Path) -> None:
    """Installed and loaded; what is none stays the host's."""
    apply = page.add("SepMEApply", 800, 200)
    content = (delta_folder / "star.safetensors").read_bytes()
    (delta_folder / "star.safetensors").unlink()
    page.drop_file("my star.safetensors", content)
    page.wait_rows(apply, "star")
    assert (delta_folder / "my star.safetensors").read_bytes() == content
    page.drop_file("lora.safetensors", (2).to_bytes(8, "little") + b"{}")
    page.wait_toast("lora.safetensors")
    assert sorted(p.name for p in delta_folder.iterdir() if p.is_file()) == [
        "my star.safetensors",
        "openmoji.safetensors",
        "tulip.safetensors",
    ]
    assert len(page.ids("SepMELoadDelta")) == 1


def test_a_copy_of_a_file_is_found_by_its_own_name(page: Page, delta_folder: Path) -> None:
    (delta_folder / "twin.safetensors").write_bytes((delta_folder / "star.safetensors").read_bytes())
    page.clear()  # the list is read again
    page.open_concepts()
    wait_shown(page, "openmoji", "star", "tulip")
    apply, loader = page.add("SepMEApply", 800, 200), page.add("SepMELoadDelta", 100, 200, delta="twin.safetensors")
    page.wire(loader, 0, apply, "deltas")
    page.wait_rows(apply, "star")
    page.sees(lambda: len(page.value(loader, "content_hash")), 64)
    assert page.value(loader, "delta") == "twin.safetensors"
    expect(page.part(loader, "sepmeCard")).not_to_contain_text("now ")


def test_other_sites_may_do_nothing(page: Page, delta_folder: Path) -> None:
    """A page of another origin, in the same browser: what it sends is refused, what it would read stays hidden."""
    before = {p.name: p.read_bytes() for p in delta_folder.rglob("*") if p.is_file()}
    stranger = page.context.new_page()
    stranger.set_content("<h1>Somebody else's</h1>")
    answers = stranger.evaluate(
        """async (url) => {
          const send = (path, options) => fetch(url + path, options).then((a) => `${a.type} ${a.status}`, (e) => e.name);
          const body = "x";
          return [
            await send("/sepme/deltas"),
            await send("/sepme/deltas?name=evil.safetensors", { method: "POST", mode: "no-cors", body }),
            await send("/sepme/deltas?name=star.safetensors", { method: "DELETE" }),
            await send("/sepme/deltas/rename", { method: "POST", body, headers: { "Content-Type": "application/json" } }),
          ];
        }""",
        page.server.url,
    )
    assert answers == ["TypeError", "opaque 0", "TypeError", "TypeError"]
    assert {p.name: p.read_bytes() for p in delta_folder.rglob("*") if p.is_file()} == before
    stranger.close()


def test_chinese(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server, locale="zh")
    apply = page.add("SepMEApply")
    loader = page.add("SepMELoadDelta", delta="star.safetensors")
    page.wire(loader, 0, apply, "deltas")
    page.wait_rows(apply, "star")
    expect(page.panel(apply)).to_contain_text("已擦除")
    assert page.tab.evaluate("(id) => sepmeTest.node(id).title", apply) == "SepME 应用"
    expect(page.open_concepts().locator("h3")).to_have_text("概念")
    item(page, "star.safetensors").locator("button:text-is('重命名')").click()
    page.tab.fill("dialog[open] input", "../mine")
    page.tab.click("dialog[open] .sepme-main")
    page.wait_toast("不允许文件名")  # the server's own sentence
    page.drop_file("evil.safetensors", b"no delta", ".sepme-sidebar")
    page.wait_toast("请重新获取")
    encode, model = page.add("SepMETextEncode", text="a city <erase:star"), page.add("SepMEDemoModel")
    page.wire(model, 1, encode, "clip")
    page.wire(encode, 1, page.add("PreviewAny"), "source")
    assert page.run()["exception_message"].startswith("无法识别标签 '<erase:star'；")
    page.server.post("/settings", {"Comfy.Locale": "en"})
