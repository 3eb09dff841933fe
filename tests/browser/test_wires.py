"""What panels know of deltas that come through subgraphs, hidden wires and other packs' nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from browser.page import Page
from browser.test_panel import chain

pytestmark = pytest.mark.xdist_group("browser")


def subgraph_of(page: Page, *nodes: str) -> str:
    """Put nodes of the graph that is shown into a subgraph, as the menu does; the id of its node."""
    before = set(page.ids())
    page.tab.evaluate("(ids) => { app.canvas.graph.convertToSubgraph(new Set(ids.map((id) => sepmeTest.node(id)))); }", list(nodes))
    page.sees(lambda: len(set(page.ids()) - before), 1)
    (made,) = set(page.ids()) - before
    return made


def enter(page: Page, node: str, kind: str) -> str:
    """Open a subgraph; the id of its one node of this kind."""
    page.tab.evaluate("(id) => sepmeTest.enter(id)", node)
    page.sees(lambda: len(page.ids(kind)), 1)
    return page.ids(kind)[0]


def leave(page: Page) -> None:
    page.tab.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")
    page.frames()


def sent_toggles(page: Page) -> Any:
    (node,) = (n for n in page.api_prompt().values() if n["class_type"] == "SepMEApply")
    return json.loads(node["inputs"]["toggles"])


def test_into_subgraphs_of_subgraphs(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "openmoji.safetensors")
    outer = subgraph_of(page, apply)
    inner = enter(page, outer, "SepMEApply")
    page.wait_rows(inner, "star", "openmoji")
    middle = subgraph_of(page, inner)
    deepest = enter(page, middle, "SepMEApply")
    page.wait_rows(deepest, "star", "openmoji")
    page.switch(deepest, "openmoji")
    assert sent_toggles(page) == {"star": 1, "openmoji": 0}


def test_out_of_subgraphs(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors", "openmoji.safetensors")
    encode = page.add("SepMETextEncode", 760, 460)
    loading = subgraph_of(page, *loaders)
    page.look()
    page.wait_rows(apply, "star", "openmoji")
    page.wait_rows(encode, "star", "openmoji")
    page.select(loading)
    page.tab.keyboard.press("Control+b")
    page.wait_rows(apply)
    page.tab.keyboard.press("Control+b")
    page.wait_rows(apply, "star", "openmoji")
    group = subgraph_of(page, apply, encode)
    encode = enter(page, group, "SepMETextEncode")
    page.wait_rows(encode, "star", "openmoji")
    page.wait_rows(page.ids("SepMEApply")[0], "star", "openmoji")


def test_a_promoted_panel_works_on_the_subgraph_node(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "openmoji.safetensors")
    page.switch(apply, "star")
    outer = subgraph_of(page, apply)
    page.promote(outer, "toggles")
    panel = page.tab.locator(".sepme-panel:visible")
    expect(panel).to_have_count(1)
    expect(panel.locator(".sepme-name")).to_have_text(["star", "openmoji"])
    panel.locator(".sepme-switch").nth(1).click()
    expect(panel.locator(".sepme-count")).to_have_text("0 of 2 erased")
    page.sees(lambda: sent_toggles(page), {"star": 0, "openmoji": 0})
    page.load_workflow(page.workflow())
    expect(panel.locator(".sepme-name")).to_have_text(["star", "openmoji"])
    panel.locator(".sepme-switch").nth(0).click()
    page.sees(lambda: sent_toggles(page), {"star": 1, "openmoji": 0})


def test_hidden_wires(page: Page) -> None:
    page.tab.evaluate("sepmeTest.others()")
    apply, loaders = chain(page, "star.safetensors", "openmoji.safetensors")
    setter, getter = page.add("TestSet", 80, 400, key="d"), page.add("TestGet", 500, 400, key="d")
    page.wire(loaders[-1], 0, setter, "in")
    page.wire(getter, 0, apply, "deltas")
    page.wait_rows(apply, "star", "openmoji")
    page.set(getter, "key", "nothing of this name")
    page.look()
    page.wait_rows(apply)
    page.tab.evaluate("(id) => app.canvas.graph.remove(sepmeTest.node(id))", getter)
    graph_id, slot = page.tab.evaluate(
        "(id) => [sepmeTest.node(id).id, sepmeTest.node(id).inputs.findIndex((i) => i.name === 'deltas')]", apply
    )
    wire = {"downstream": graph_id, "downstream_slot": slot, "upstream": int(loaders[-1]), "upstream_slot": 0, "type": "DELTAS"}
    page.tab.evaluate("(wire) => { app.canvas.graph.extra.ue_links = [wire]; }", wire)  # as Anything Everywhere notes them
    page.look()
    page.wait_rows(apply, "star", "openmoji")


def test_deltas_of_nodes_that_say_nothing(page: Page) -> None:
    page.tab.evaluate("sepmeTest.others()")
    apply, foreign = page.add("SepMEApply", 760, 140), page.add("TestForeign", 80, 400)
    expect(page.panel(apply)).to_contain_text("Connect deltas")
    page.wire(foreign, 0, apply, "deltas")
    expect(page.panel(apply)).to_contain_text("Deltas are connected; which concepts they erase cannot be seen from here.")
