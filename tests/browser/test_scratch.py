from __future__ import annotations
import os, json
import pytest
from browser.page import Page, CONCEPTS
from browser.test_panel import chain
pytestmark = pytest.mark.xdist_group("browser")

def test_shot(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors", "heart.safetensors", "striped.safetensors")
    enc = page.add("SepMETextEncode", 760, 460)
    page.set(enc, "text", "a city <erase:picaso> <keep:star>")
    clip = page.add("CLIPTextEncode", 1150, 160)
    page.tab.mouse.click(300, 860)
    page.wait_rows(enc, "star", "heart", "striped")
    page.frames()
    page.tab.screenshot(path=f"/tmp/shot-{page.vue}.png")
    print(page.tab.evaluate("[...document.querySelectorAll('.sepme-rows')].map(l => [l.scrollHeight, l.clientHeight])"))
    page.tab.wait_for_timeout(500)
    page.tab.mouse.click(300, 860)
    page.tab.wait_for_timeout(500)
    print(page.tab.evaluate("[...document.querySelectorAll('textarea')].map(a => [a.value, a.closest('[data-node-id]')?.dataset.nodeId, a.parentElement.outerHTML.slice(0,300)])"))
    print(page.tab.evaluate("[...document.querySelectorAll('.sepme-tags')].map(l => l.textContent)"))
    print(page.errors[:5])
