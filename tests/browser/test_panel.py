"""The toggle panel as users touch it, in both renderers."""

from __future__ import annotations

import json

import pytest
from browser.page import Page

pytestmark = pytest.mark.xdist_group("browser")


def chain(page: Page, *files: str) -> tuple[str, list[str]]:
    """A SepMEApply behind loaders of these files; the ids."""
    model = page.add("SepMEDemoModel", 80, 620)
    apply = page.add("SepMEApply", 760, 140)
    loaders: list[str] = []
    for i, file in enumerate(files):
        loader = page.add("SepMELoadDelta", 80 + 330 * (i % 2), 140 + 220 * (i // 2), delta=file)
        if loaders:
            page.wire(loaders[-1], 0, loader, "deltas")
        loaders.append(loader)
    page.wire(model, 0, apply, "model")
    if loaders:
        page.wire(loaders[-1], 0, apply, "deltas")
    return apply, loaders


def test_rows_come_with_wires_and_change_the_value(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors", "heart.safetensors")
    page.wait_rows(apply, "star", "heart")
    assert page.value(apply, "toggles") == "{}"  # nothing was touched: both are erased by default
    page.switch(apply, "heart")
    assert page.toggles(apply) == {"star": 1, "heart": 0}
    number = page.row(apply, "star").query_selector(".sepme-number")
    number.fill("0.35")
    number.press("Tab")
    assert page.toggles(apply) == {"star": 0.35, "heart": 0}
    slider = page.row(apply, "star").query_selector(".sepme-slider")
    slider.focus()
    slider.press("ArrowRight")
    assert page.toggles(apply)["star"] == pytest.approx(0.4)
    page.switch(apply, "star")
    page.switch(apply, "star")
    assert page.toggles(apply)["star"] == pytest.approx(0.4)  # the strength before it was switched off
    for button, expected in (("All", [1, 1]), ("Invert", [0, 0]), ("Invert", [1, 1]), ("None", [0, 0])):
        page.panel(apply).query_selector(f"text={button}").click()
        assert list(page.toggles(apply).values()) == expected, button
    striped = page.add("SepMELoadDelta", 80, 380, delta="striped.safetensors")
    page.wire(striped, 0, loaders[0], "deltas")
    page.wait_rows(apply, "star", "heart", "striped")
    assert page.api_prompt()[apply]["inputs"]["toggles"] == '{"star": 0, "heart": 0}'


def test_keyboard_and_screen_readers(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "heart.safetensors")
    page.wait_rows(apply, "star", "heart")
    first = page.row(apply, "star").query_selector(".sepme-switch")
    first.focus()
    assert (first.get_attribute("role"), first.get_attribute("aria-checked")) == ("switch", "true")
    assert first.get_attribute("aria-label") == "Erase star"
    first.press("Space")
    assert first.get_attribute("aria-checked") == "false"
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Enter")
    assert page.toggles(apply) == {"star": 0, "heart": 0}
    page.tab.keyboard.press("Alt+ArrowUp")
    assert list(page.toggles(apply)) == ["heart", "star"]
    assert page.names(apply) == ["heart", "star"]
    assert page.panel(apply).get_attribute("role") == "group"
    assert page.row(apply, "star").query_selector(".sepme-dot").get_attribute("aria-label")


def test_reorder_by_mouse(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "heart.safetensors", "striped.safetensors")
    page.wait_rows(apply, "star", "heart", "striped")
    grip = page.row(apply, "striped").query_selector(".sepme-grip").bounding_box()
    top = page.row(apply, "star").bounding_box()
    page.tab.mouse.move(grip["x"] + 4, grip["y"] + 8)
    page.tab.mouse.down()
    page.tab.mouse.move(grip["x"] + 4, top["y"] + 8, steps=6)
    page.tab.mouse.up()
    assert page.names(apply) == ["striped", "star", "heart"]
    assert list(page.toggles(apply)) == ["striped", "star", "heart"]


def test_undo_redo(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors")
    page.wait_rows(apply, "star")
    page.tab.mouse.click(700, 800)
    page.settle()
    page.switch(apply, "star")
    assert page.toggles(apply) == {"star": 0}
    page.tab.evaluate("document.activeElement.blur()")
    page.tab.keyboard.press("Control+z")
    page.settle(600)
    assert page.value(apply, "toggles") == "{}"
    page.wait_rows(apply, "star")
    page.tab.keyboard.press("Control+y")
    page.settle(600)
    assert page.toggles(apply) == {"star": 0}


def test_value_survives_save_load_copy_and_paste(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "heart.safetensors")
    page.wait_rows(apply, "star", "heart")
    page.switch(apply, "heart")
    saved = page.workflow()
    (entry,) = (n for n in saved["nodes"] if n["type"] == "SepMEApply")
    assert entry["widgets_values"][0] == '{"star": 1, "heart": 0}'
    hashes = {n["widgets_values"][1] for n in saved["nodes"] if n["type"] == "SepMELoadDelta"}
    assert set(saved["extra"]["sepme"]) == hashes
    page.load_workflow(saved)
    page.wait_rows(apply, "star", "heart")
    assert page.toggles(apply) == {"star": 1, "heart": 0}
    page.tab.evaluate("(id) => app.canvas.selectNode(sepmeTest.node(id))", apply)
    page.tab.evaluate("app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard()")
    page.settle()
    copies = [n for n in page.workflow()["nodes"] if n["type"] == "SepMEApply"]
    assert [json.loads(n["widgets_values"][0]) for n in copies] == [{"star": 1, "heart": 0}] * 2
    assert page.toggles(str(copies[1]["id"])) == {"star": 1, "heart": 0}
    assert page.names(str(copies[1]["id"])) == ["star", "heart"]  # its deltas are not connected: kept and marked
    assert all(page.row(str(copies[1]["id"]), n).query_selector(".sepme-lost") for n in ("star", "heart"))


def test_reroutes_bypassed_nodes_and_subgraphs(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors", "heart.safetensors")
    reroute = page.add("Reroute", 640, 300)
    page.tab.evaluate("([a, r, b]) => { sepmeTest.node(a).connect(0, sepmeTest.node(r), 0); }", [loaders[-1], reroute, apply])
    page.wire(reroute, 0, apply, "deltas")
    page.wait_rows(apply, "star", "heart")
    page.tab.evaluate("(id) => { sepmeTest.node(id).mode = 4; app.canvas.graph.change?.(); }", loaders[1])
    page.tab.evaluate("(id) => { sepmeTest.node(id).onConnectionsChange?.(); }", apply)
    page.wait_rows(apply, "star")
    page.tab.evaluate("(id) => { sepmeTest.node(id).mode = 0; sepmeTest.node(id).onConnectionsChange?.(); }", loaders[1])
    page.wait_rows(apply, "star", "heart")
    page.switch(apply, "star")
    page.tab.evaluate("(id) => { const n = sepmeTest.node(id); app.canvas.graph.convertToSubgraph(new Set([n])); }", apply)
    page.settle(500)
    outer = page.tab.evaluate("String(app.canvas.graph.nodes.find((n) => n.isSubgraphNode?.()).id)")
    page.tab.evaluate("(id) => sepmeTest.enter(id)", outer)
    page.settle(600)
    inner = page.tab.evaluate("String(app.canvas.graph.nodes.find((n) => n.comfyClass === 'SepMEApply').id)")
    page.wait_rows(inner, "star", "heart")
    assert page.toggles(inner) == {"star": 0, "heart": 1}
    page.switch(inner, "heart")
    prompt = page.api_prompt()
    (apply_prompt,) = (n for n in prompt.values() if n["class_type"] == "SepMEApply")
    assert json.loads(apply_prompt["inputs"]["toggles"]) == {"star": 0, "heart": 0}


def test_prompt_nodes_inherit_until_set(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "heart.safetensors")
    encode = page.add("SepMETextEncode", 760, 460)
    page.wait_rows(encode, "star", "heart")
    toggle = page.row(encode, "star").query_selector(".sepme-switch")
    assert toggle.get_attribute("aria-checked") == "mixed"
    page.switch(encode, "star")
    assert page.toggles(encode) == {"star": 1}
    page.switch(encode, "star")
    assert page.toggles(encode) == {"star": 0}
    page.row(encode, "star").query_selector(".sepme-drop").click()
    assert page.value(encode, "toggles") == "{}"
    assert toggle.get_attribute("aria-checked") == "mixed"
    assert page.value(apply, "toggles") == "{}"


def test_unknown_names_are_kept_marked_and_can_be_forgotten(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors")
    page.tab.evaluate('(id) => { sepmeTest.node(id).widgets[0].value = \'{"picasso": 0.5, "Star": 0}\' }', apply)
    page.wait_rows(apply, "picasso", "Star")
    lost = page.row(apply, "picasso")
    assert "No delta of picasso" in lost.query_selector(".sepme-dot").get_attribute("title")
    assert page.row(apply, "Star").query_selector(".sepme-lost") is None  # names compare without case
    page.switch(apply, "Star")
    assert page.toggles(apply) == {"picasso": 0.5, "Star": 1}
    lost.query_selector(".sepme-drop").click()
    assert page.toggles(apply) == {"Star": 1}
    page.tab.evaluate("(id) => { sepmeTest.node(id).widgets[0].value = 'no json' }", apply)
    page.settle()
    assert page.value(apply, "toggles") == "no json"  # nothing of the user's is thrown away unasked
    page.panel(apply).query_selector("text=Start anew").click()
    assert page.value(apply, "toggles") == "{}"


def test_concepts_that_are_yet_to_be_trained(page: Page) -> None:
    book = page.add("SepMEConceptBook", 80, 140, book="concepts: [" + ", ".join(f"artist {i}" for i in range(12)) + "]")
    one = page.add("SepMEConcept", 80, 420, name="circle")
    train = page.add("SepMETrain", 420, 140, erase="circle, artist 3, artist 1")
    apply = page.add("SepMEApply", 800, 140)
    page.wire(book, 0, one, "concepts")
    page.wire(one, 0, train, "concepts")
    page.wire(train, 0, apply, "deltas")
    page.wait_rows(apply, "artist 1", "artist 3", "circle")
    page.set(train, "erase", "*")
    page.tab.evaluate("(id) => sepmeTest.node(id).onConnectionsChange()", train)
    page.wait_rows(apply, *(f"artist {i}" for i in range(12)), "circle")
    search = page.panel(apply).query_selector(".sepme-search")
    search.fill("1")
    assert page.names(apply) == ["artist 1", "artist 10", "artist 11"]
    page.panel(apply).query_selector("text=None").click()  # what is shown, no more
    assert [n for n, s in page.toggles(apply).items() if not s] == ["artist 1", "artist 10", "artist 11"]


def test_a_delta_for_another_model_is_marked(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors")
    page.wait_rows(apply, "star")
    page.tab.evaluate(
        """async () => { const { library } = await import('/extensions/comfyui-sepme/js/library.js');
        library.deltas.find((d) => d.concept === 'star').architecture = 'sdxl'; library.dispatchEvent(new Event('change')); }"""
    )
    page.tab.wait_for_function("(id) => !sepmeTest.node(id).sepmePanel.note.hidden", arg=apply)
    assert "star is for sdxl" in page.panel(apply).query_selector(".sepme-note").inner_text()
    page.tab.evaluate("async () => (await import('/extensions/comfyui-sepme/js/library.js')).library.load()")
    page.tab.wait_for_function("(id) => sepmeTest.node(id).sepmePanel.note.hidden", arg=apply)
    assert loaders
