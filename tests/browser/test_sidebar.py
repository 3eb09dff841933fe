"""The sidebar tab: listed, filtered, dragged into the graph, installed, renamed, deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browser.page import Page
from comfyui.server import Server

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture
def tab(server: Server, open_page: Callable[..., Page]) -> Page:
    """The page with the tab open."""
    page = open_page(server)
    if not page.tab.query_selector(".sepme-sidebar"):
        page.tab.locator(".sepme-concepts-tab-button").click()
    page.tab.wait_for_selector(".sepme-sidebar .sepme-delta")
    return page


def shown(page: Page) -> list[str]:
    return [e.inner_text() for e in page.tab.query_selector_all(".sepme-sidebar summary b")]


def answer(page: Page, button: str) -> None:
    page.tab.wait_for_selector("dialog[open]")
    page.tab.click(f"dialog[open] button:text-is('{button}')")
    page.settle(400)


def test_lists_and_filters(tab: Page) -> None:
    assert shown(tab) == ["heart", "star", "striped"]
    search = tab.tab.locator(".sepme-sidebar .sepme-search")
    search.fill("drawing of a star")
    assert shown(tab) == ["star"]
    tab.tab.click(".sepme-sidebar summary")
    text = tab.tab.inner_text(".sepme-sidebar dl")
    for fact in ("star.safetensors", "unet-192x7", "closed-form", "a picture of a star"):
        assert fact in text
    search.fill("")
    assert shown(tab) == ["heart", "star", "striped"]


def test_dragging_makes_wired_loaders(tab: Page) -> None:
    apply = tab.add("SepMEApply", 800, 200)
    for concept in ("star", "heart"):
        item = tab.tab.locator(f".sepme-delta:has(b:text-is('{concept}')) summary")
        item.drag_to(tab.tab.locator("#graph-canvas"), target_position={"x": 700, "y": 500})
        tab.wait_rows(apply, *(("star",) if concept == "star" else ("star", "heart")))
    loaders = [n for n in tab.workflow()["nodes"] if n["type"] == "SepMELoadDelta"]
    assert {n["widgets_values"][0] for n in loaders} == {"star.safetensors", "heart.safetensors"}
    assert all(len(n["widgets_values"][1]) == 64 for n in loaders)
    assert not [n for n in tab.workflow()["nodes"] if n["type"] not in ("SepMELoadDelta", "SepMEApply")]


def test_install_rename_delete(tab: Page, delta_folder: Path) -> None:
    data = (delta_folder / "star.safetensors").read_bytes()
    tab.drop_file("copy.safetensors", data, ".sepme-sidebar")
    tab.tab.wait_for_function("document.querySelectorAll('.sepme-sidebar .sepme-delta').length === 4")
    assert (delta_folder / "copy.safetensors").read_bytes() == data
    tab.drop_file("copy.safetensors", (delta_folder / "heart.safetensors").read_bytes(), ".sepme-sidebar")
    answer(tab, "Close")  # another file has the name: not replaced
    assert (delta_folder / "copy.safetensors").read_bytes() == data
    tab.drop_file("copy.safetensors", (delta_folder / "heart.safetensors").read_bytes(), ".sepme-sidebar")
    answer(tab, "Replace")
    assert (delta_folder / "copy.safetensors").read_bytes() == (delta_folder / "heart.safetensors").read_bytes()
    tab.drop_file("evil.safetensors", b"no delta", ".sepme-sidebar")
    tab.tab.wait_for_selector(".p-toast-message-error, .p-toast-message:has-text('not installed')")
    assert sorted(p.stem for p in delta_folder.iterdir()) == ["copy", "heart", "star", "striped"]

    item = tab.tab.locator(".sepme-delta[data-name='copy.safetensors']")
    item.locator("summary").click()
    item.locator("button:text-is('Rename')").click()
    tab.tab.fill("dialog[open] input", "styles/mine")
    answer(tab, "OK")
    assert (delta_folder / "styles" / "mine.safetensors").exists()
    item = tab.tab.locator(".sepme-delta[data-name='styles/mine.safetensors']")
    item.locator("summary").click()
    item.locator("button:text-is('Delete')").click()
    answer(tab, "Close")
    assert (delta_folder / "styles" / "mine.safetensors").exists()
    item.locator("button:text-is('Delete')").click()
    answer(tab, "Delete")
    assert not (delta_folder / "styles" / "mine.safetensors").exists()
    assert shown(tab) == ["heart", "star", "striped"]


def test_chinese(server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(server, locale="zh")
    apply = page.add("SepMEApply")
    loader = page.add("SepMELoadDelta", delta="star.safetensors")
    page.wire(loader, 0, apply, "deltas")
    page.wait_rows(apply, "star")
    assert "已擦除" in page.panel(apply).inner_text()
    title = page.tab.evaluate("(id) => sepmeTest.node(id).title", apply)
    assert title == "SepME 应用"
    page.server.post("/settings", {"Comfy.Locale": "en"})
