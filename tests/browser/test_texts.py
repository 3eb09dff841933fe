"""Tags in texts: completed, and marked where they are wrong or where nobody reads them."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

from browser.page import Page
from browser.test_panel import chain

pytestmark = pytest.mark.xdist_group("browser")


def field(page: Page, node: str) -> Any:
    """The text of an encode node."""
    return page.tab.locator(f"[data-node-id='{node}'] textarea").first if page.vue else page.text(node)


def said(page: Page, node: str) -> Any:
    """What stands on a text about its tags."""
    return field(page, node).locator("xpath=..").locator(".sepme-tags > div")


def test_completion(page: Page) -> None:
    encode = page.add("SepMETextEncode", 300, 200)
    field(page, encode).click()
    page.tab.keyboard.type("a city <")
    choices = page.tab.locator(".sepme-completion [role=option]")
    expect(choices).to_contain_text(["erase:", "keep:"])
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("T")
    expect(choices).to_have_text(["tulip", "star"])
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Tab")
    page.sees(lambda: page.value(encode, "text"), "a city <erase:star>")
    page.tab.keyboard.type(" <keep:op")
    expect(choices).to_have_text(["openmoji"])
    page.tab.keyboard.press("Escape")
    expect(choices).to_have_count(0)
    page.tab.keyboard.type("enmoji>")
    page.sees(lambda: page.api_prompt()[encode]["inputs"]["text"], "a city <erase:star> <keep:openmoji>")


def test_completion_in_every_prompt(page: Page) -> None:
    encode = page.add("CLIPTextEncode", 300, 200)
    field(page, encode).click()
    page.tab.keyboard.type("a < b <")
    choices = page.tab.locator(".sepme-completion [role=option]")
    expect(choices).to_have_count(0)  # here that may begin anything
    page.tab.keyboard.type("ke")
    expect(choices).to_have_count(1)
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("ope")
    expect(choices).to_have_text(["openmoji"])
    page.tab.keyboard.press("Tab")
    page.sees(lambda: page.value(encode, "text"), "a < b <keep:openmoji>")
    book = page.add("SepMEConceptBook", 700, 200, book="")  # no prompt
    field(page, book).click()
    page.tab.keyboard.type("<keep:star")
    page.sees(lambda: page.value(book, "book"), "<keep:star")
    field(page, encode).click()  # where it is looked up, the list comes; what was asked before has been answered
    page.tab.keyboard.press("Control+End")
    page.tab.keyboard.type(" <erase:star")
    expect(choices).to_have_count(1)


def test_what_is_wrong_with_tags_is_said(page: Page) -> None:
    chain(page, "star.safetensors", "tulip.safetensors")
    encode = page.add("SepMETextEncode", 760, 460)
    field(page, encode).click()
    page.tab.keyboard.type("a city <erase:star:0.5> <keep:Tulip>")
    page.wait_rows(encode, "star", "tulip")
    expect(said(page, encode)).to_have_count(0)
    page.tab.keyboard.type(" <erase:picaso> <keep:star:1> ＜keep:star＞ <erase:star:two> <keep:star")
    expect(said(page, encode)).to_have_text(
        ["<erase:picaso>: no delta of picaso is connected."]
        + [
            f"{tag} is no tag; write <erase:name>, <erase:name:0.7> or <keep:name>."
            for tag in ("<keep:star:1>", "<erase:star:two>", "＜keep:star＞", "<keep:star")
        ],
        use_inner_text=True,
    )
    assert said(page, encode).locator("*").count() == 0  # text, whatever stands in it
    page.tab.keyboard.press("Control+a")
    page.tab.keyboard.type("a city")
    expect(said(page, encode)).to_have_count(0)


def test_texts_that_are_not_ours(page: Page) -> None:
    """A warning where the text's picture is drawn with our deltas, none anywhere else."""
    apply, _ = chain(page, "star.safetensors")
    sampler, other = page.add("KSampler", 1150, 140), page.add("CLIPTextEncodeHunyuanDiT", 420, 420)
    field(page, other).click()
    page.tab.keyboard.type("a city <erase:star>")
    page.wire(other, 0, sampler, "positive")
    page.look()
    page.frames()
    expect(said(page, other)).to_have_count(0)
    page.wire(apply, 0, sampler, "model")
    page.look()
    expect(said(page, other)).to_contain_text(["are only words here"])
    page.load_workflow(page.workflow())
    expect(said(page, other)).to_contain_text(["are only words here"])
    toggles = page.add("SepMEConditioningToggles", 760, 460)
    page.wire(other, 0, toggles, "conditioning")
    page.wire(toggles, 0, sampler, "positive")
    page.look()
    expect(said(page, other)).to_contain_text(["are only words here"])
    field(page, other).click()
    page.tab.keyboard.press("Control+a")
    page.tab.keyboard.type("a city")
    expect(said(page, other)).to_have_count(0)


def test_core_text_encode_reads_tags(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors")
    sampler, core = page.add("KSampler", 1150, 140), page.add("CLIPTextEncode", 420, 420)
    page.wire(apply, 0, sampler, "model")
    page.wire(core, 0, sampler, "positive")
    field(page, core).click()
    page.tab.keyboard.type("a city <erase:star.safetensors> <erase:tulip>")
    expect(said(page, core)).to_have_text(["<erase:tulip>: no delta of tulip is connected."])
