"""The toggle panel as users touch it, in both renderers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import expect

from browser.page import Page
from sepme.delta.concept_delta import ConceptDelta

pytestmark = pytest.mark.xdist_group("browser")


LAYERS = {"input_blocks.1.1.transformer_blocks.0.attn2.to_k": (12, 16)}  # of no model here


def chain(page: Page, *files: str, model: bool = True) -> tuple[str, list[str]]:
    """A SepMEApply behind loaders of these files; the ids."""
    apply = page.add("SepMEApply", 760, 140)
    loaders: list[str] = []
    for i, file in enumerate(files):
        loader = page.add("SepMELoadDelta", 80 + 330 * (i % 2), 140 + 220 * (i // 2), delta=file)
        if loaders:
            page.wire(loaders[-1], 0, loader, "deltas")
        loaders.append(loader)
    if model:
        page.wire(page.add("SepMEDemoModel", 80, 620), 0, apply, "model")
    if loaders:
        page.wire(loaders[-1], 0, apply, "deltas")
    page.wait_rows(apply, *(Path(file).stem for file in files))
    for loader in loaders:
        page.sees(lambda loader=loader: len(page.value(loader, "content_hash")), 64)  # what the page adds to new nodes is there
    return apply, loaders


def test_rows_come_with_wires_and_change_the_value(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors", "openmoji.safetensors")
    assert page.value(apply, "toggles") == "{}"  # nothing was touched: both are erased by default
    page.switch(apply, "openmoji")
    page.wait_toggles(apply, {"star": 1, "openmoji": 0})
    number = page.row(apply, "star").locator(".sepme-number")
    number.fill("0.35")
    number.press("Tab")
    page.wait_toggles(apply, {"star": 0.35, "openmoji": 0})
    number.fill("1e9")
    number.press("Enter")
    page.wait_toggles(apply, {"star": 100, "openmoji": 0})
    number.fill("0.35")
    number.press("Enter")
    page.row(apply, "star").locator(".sepme-slider").press("ArrowRight")
    page.wait_toggles(apply, {"star": 0.4, "openmoji": 0})
    page.switch(apply, "star")
    page.switch(apply, "star")
    page.wait_toggles(apply, {"star": 0.4, "openmoji": 0})  # the strength before it was switched off
    for button, on in (("All", 1), ("Invert", 0), ("Invert", 1), ("None", 0)):
        page.panel(apply).locator(f"button:text-is('{button}')").click()
        page.wait_toggles(apply, {"star": on, "openmoji": on})
    tulip = page.add("SepMELoadDelta", 80, 380, delta="tulip.safetensors")
    page.wire(tulip, 0, loaders[0], "deltas")
    page.wait_rows(apply, "star", "openmoji", "tulip")
    assert page.api_prompt()[apply]["inputs"]["toggles"] == '{"star": 0, "openmoji": 0}'


def test_certificates_by_colour_and_shape(page: Page, delta_folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    good = {"leakage_linear": {"x": 0.02}, "leakage_gated": {"x": 0.0}, "gate_low": 0.2, "gate_high": 0.6, "false_touch_rate": 0.0}
    changes = {"good": {}, "fair": {"false_touch_rate": 0.01}, "poor": {"leakage_gated": {"x": 0.5}}}
    infos = {grade: {"certificate": good | change} for grade, change in changes.items()} | {"unknown": {}}
    for i, (grade, info) in enumerate(infos.items()):
        made = make_random_delta(grade, LAYERS, seed=i, gate=0.4, **info)
        (delta_folder / f"{grade}.safetensors").write_bytes(made.to_bytes())
    page.clear()  # the list is read again
    apply, _ = chain(page, *(f"{grade}.safetensors" for grade in infos), model=False)
    looks = set()
    for grade in infos:
        dot = page.row(apply, grade).locator(".sepme-dot")
        looks.add(dot.evaluate("(e) => `${getComputedStyle(e).backgroundColor} ${getComputedStyle(e, '::before').content}`"))
        assert f"sepme-{grade}" in dot.get_attribute("class")
        assert ("leakage 0.020" in dot.get_attribute("title")) == (grade != "unknown")
    assert len(looks) == 4


def test_keyboard_and_screen_readers(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "openmoji.safetensors")
    page.row(apply, "star").locator(".sepme-switch").press("Space")
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Enter")
    page.wait_toggles(apply, {"star": 0, "openmoji": 0})
    page.tab.keyboard.press("Space")
    page.tab.keyboard.press("Alt+ArrowUp")
    page.wait_toggles(apply, {"openmoji": 1, "star": 0})
    page.wait_rows(apply, "openmoji", "star")
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("ArrowLeft")
    page.wait_toggles(apply, {"openmoji": 0.95, "star": 0})
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.type("-2")
    page.tab.keyboard.press("Tab")
    page.wait_toggles(apply, {"openmoji": -2, "star": 0})
    page.tab.keyboard.press("Tab")
    assert page.row(apply, "star").locator(".sepme-slider").evaluate("(e) => e === document.activeElement")
    assert page.ids("SepMEApply") == [apply]  # no key went to the host, whose own shortcuts would have changed the graph
    expect(page.panel(apply)).to_match_aria_snapshot("""
      - group "Erased concepts":
        - status: 1 of 2 erased
        - button "All"
        - button "None"
        - button "Invert"
        - list:
          - listitem:
            - img /^Safe/
            - switch "Erase openmoji" [checked]
            - text: openmoji
            - slider "Strength of openmoji"
            - spinbutton "Strength of openmoji": "-2"
          - listitem:
            - img
            - switch "Erase star"
            - text: star
            - slider "Strength of star"
            - spinbutton "Strength of star": "0"
    """)


def test_reorder_by_mouse(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "openmoji.safetensors", "tulip.safetensors")
    grip = page.row(apply, "tulip").locator(".sepme-grip").bounding_box()
    top = page.row(apply, "star").bounding_box()
    page.tab.mouse.move(grip["x"] + 4, grip["y"] + 8)
    page.tab.mouse.down()
    page.tab.mouse.move(grip["x"] + 4, top["y"] + 8, steps=6)
    page.tab.mouse.up()
    page.wait_rows(apply, "tulip", "star", "openmoji")
    page.wait_toggles(apply, {"tulip": 1, "star": 1, "openmoji": 1})


def test_undo_redo(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors")
    page.load_workflow(page.workflow())  # the order of nodes is a step of undo too, and made by scripts it is another
    page.wait_rows(apply, "star")
    page.switch(apply, "star")
    page.wait_toggles(apply, {"star": 0})
    page.row(apply, "star").locator(".sepme-switch").focus()  # right from the switch, as one does
    page.tab.keyboard.press("Control+z")
    page.wait_toggles(apply, {})
    page.wait_rows(apply, "star")
    page.tab.mouse.click(300, 600)
    page.tab.keyboard.press("Control+y")
    page.wait_toggles(apply, {"star": 0})
    expect(page.row(apply, "star").locator(".sepme-switch")).to_have_attribute("aria-checked", "false")


def test_value_survives_save_load_copy_and_paste(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "openmoji.safetensors")
    page.switch(apply, "openmoji")
    saved = page.workflow()
    (entry,) = (n for n in saved["nodes"] if n["type"] == "SepMEApply")
    assert entry["widgets_values"][0] == '{"star": 1, "openmoji": 0}'
    hashes = {n["widgets_values"][1] for n in saved["nodes"] if n["type"] == "SepMELoadDelta"}
    assert set(saved["extra"]["sepme"]) == hashes
    page.load_workflow(saved)
    page.wait_rows(apply, "star", "openmoji")
    page.wait_toggles(apply, {"star": 1, "openmoji": 0})
    page.select(apply)
    page.tab.keyboard.press("Control+c")
    page.tab.mouse.move(300, 500)  # where it is pasted
    page.tab.keyboard.press("Control+v")
    page.sees(lambda: len(page.ids("SepMEApply")), 2)
    (copy,) = set(page.ids("SepMEApply")) - {apply}
    page.wait_toggles(copy, {"star": 1, "openmoji": 0})
    page.wait_rows(copy, "star", "openmoji")  # its deltas are not connected: kept and marked
    expect(page.panel(copy).locator(".sepme-lost")).to_have_count(2)
    page.switch(copy, "star")  # a copy has a value of its own
    page.wait_toggles(copy, {"star": 0, "openmoji": 0})
    page.wait_toggles(apply, {"star": 1, "openmoji": 0})


def test_reroutes_bypassed_nodes_and_subgraphs(page: Page) -> None:
    apply, loaders = chain(page, "star.safetensors", "openmoji.safetensors")
    reroute = page.add("Reroute", 640, 300)
    page.tab.evaluate("([a, r]) => { sepmeTest.node(a).connect(0, sepmeTest.node(r), 0); }", [loaders[-1], reroute])
    page.wire(reroute, 0, apply, "deltas")
    page.wait_rows(apply, "star", "openmoji")
    page.select(loaders[1])
    for rows in (("star",), ("star", "openmoji")):
        page.tab.keyboard.press("Control+b")  # bypass, and back
        page.wait_rows(apply, *rows)
    page.switch(apply, "star")
    page.tab.evaluate("(id) => { app.canvas.graph.convertToSubgraph(new Set([sepmeTest.node(id)])); }", apply)
    page.until("app.canvas.graph.nodes.some((n) => n.isSubgraphNode?.())")
    outer = page.tab.evaluate("String(app.canvas.graph.nodes.find((n) => n.isSubgraphNode?.()).id)")
    page.tab.evaluate("(id) => sepmeTest.enter(id)", outer)
    page.sees(lambda: len(page.ids("SepMEApply")), 1)
    (inner,) = page.ids("SepMEApply")
    page.wait_rows(inner, "star", "openmoji")
    page.wait_toggles(inner, {"star": 0, "openmoji": 1})
    page.switch(inner, "openmoji")
    (exported,) = (n for n in page.api_prompt().values() if n["class_type"] == "SepMEApply")
    assert json.loads(exported["inputs"]["toggles"]) == {"star": 0, "openmoji": 0}


def test_prompt_nodes_inherit_until_set(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors", "openmoji.safetensors")
    encode = page.add("SepMETextEncode", 760, 460)
    page.wait_rows(encode, "star", "openmoji")
    toggle, count = page.row(encode, "star").locator(".sepme-switch"), page.panel(encode).locator(".sepme-count")
    expect(count).to_have_text("2 of 2 erased")  # as SepME Apply does
    expect(page.panel(encode).locator(".sepme-inherited")).to_have_count(2)
    for strength in (0, 1):  # the first click keeps
        page.switch(encode, "star")
        page.wait_toggles(encode, {"star": strength})
    page.row(encode, "star").locator(".sepme-drop").click()
    page.wait_toggles(encode, {})
    expect(toggle).to_have_attribute("aria-checked", "true")
    assert page.value(apply, "toggles") == "{}"
    page.switch(apply, "star")
    expect(toggle).to_have_attribute("aria-checked", "false")
    expect(count).to_have_text("1 of 2 erased")
    page.switch(encode, "star")
    page.wait_toggles(encode, {"star": 1})
    number = page.row(apply, "openmoji").locator(".sepme-number")
    number.fill("0.4")
    number.press("Enter")
    expect(page.row(encode, "openmoji").locator(".sepme-number")).to_have_attribute("placeholder", "0.4")
    page.set(encode, "text", "a city <keep:Openmoji>")
    page.look()
    expect(page.row(encode, "openmoji").locator(".sepme-switch")).to_be_disabled()  # tags go before switches
    expect(count).to_have_text("1 of 2 erased")


def test_a_prompt_follows_the_models_that_draw_it(page: Page) -> None:
    """Two SepME Apply nodes one behind the other, a third elsewhere; a prompt node behind another."""
    first, _ = chain(page, "star.safetensors", "openmoji.safetensors")
    second, other = page.add("SepMEApply", 1180, 140), page.add("SepMEApply", 1180, 420)
    encode, later = page.add("SepMETextEncode", 760, 460), page.add("SepMEConditioningToggles", 1180, 700)
    sampler, another = page.add("KSampler", 1580, 140), page.add("KSampler", 1580, 500)
    tulip = page.add("SepMELoadDelta", 80, 380, delta="tulip.safetensors")
    for source, output, target, name in (
        (first, 0, second, "model"), (tulip, 0, second, "deltas"), (second, 0, sampler, "model"), (encode, 0, later, "conditioning"),
        (later, 0, sampler, "positive"), (tulip, 0, other, "deltas"),
    ):  # fmt: skip
        page.wire(source, output, target, name)
    page.set(first, "toggles", '{"star": 0.5, "openmoji": 0}')
    page.set(second, "toggles", '{"openmoji": 0.25}')
    page.set(other, "toggles", '{"tulip": 0}')  # draws nothing of this
    page.set(encode, "toggles", '{"tulip": 0.75}')
    page.look()

    def strengths(node: str) -> dict[str, str]:
        rows = page.panel(node).locator(".sepme-inherited").all()
        return {r.locator(".sepme-name").inner_text(): r.locator(".sepme-number").get_attribute("placeholder") for r in rows}

    page.sees(lambda: strengths(encode), {"openmoji": "0.25", "star": "0.5"})
    page.sees(lambda: strengths(later), {"openmoji": "0.25", "star": "0.5", "tulip": "0.75"})
    page.wire(other, 0, another, "model")
    page.wire(later, 0, another, "negative")
    page.look()
    page.sees(lambda: strengths(encode), {"openmoji": "0.25", "star": "0.5"})
    page.set(encode, "toggles", "{}")
    page.look()
    page.sees(lambda: strengths(later), {"openmoji": "0.25", "star": "0.5", "tulip": "?"})  # one model erases it, the other does not
    page.switch(later, "tulip")
    page.wait_toggles(later, {"tulip": 0})


def test_no_scroll_bar_up_to_eight_rows(page: Page, delta_folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    names = [f"concept {i}" for i in range(8)]
    for i, name in enumerate(names):  # two of one content would be shown as one
        (delta_folder / f"{name}.safetensors").write_bytes(make_random_delta(name, LAYERS, seed=i).to_bytes())
    page.clear()
    encode = page.add("SepMETextEncode", 1150, 460)
    for count in (1, 2, 3, 8):
        apply, loaders = chain(page, *(f"{n}.safetensors" for n in names[:count]), model=False)
        page.wait_rows(encode, *names[:count])
        for node in (apply, encode):
            page.sees(lambda node=node: page.panel(node).locator(".sepme-rows").evaluate("(e) => e.scrollHeight - e.clientHeight"), 0)
            page.sees(lambda node=node: page.panel(node).evaluate("(e) => e.scrollHeight - e.clientHeight"), 0)
        page.tab.evaluate("(ids) => ids.forEach((id) => app.canvas.graph.remove(sepmeTest.node(id)))", [apply, *loaders])


def test_names_are_text(page: Page, delta_folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    """Quotes, brackets, entities, markup characters, emoji, right-to-left and very long names: shown, switched and sent as they are."""
    names = ['the "x" [y]', "a & b &lt;b&gt; {name}", "🦄 ½ $& $1 'q' \\ `c`", "__proto__", "شجرة", "w" * 120]
    for i, name in enumerate(names):
        (delta_folder / f"odd{i}.safetensors").write_bytes(make_random_delta(name, LAYERS, seed=i).to_bytes())
    page.clear()
    apply = page.add("SepMEApply", 760, 140)
    loaders = [page.add("SepMELoadDelta", 80 + 330 * (i % 2), 140 + 220 * (i // 2), delta=f"odd{i}.safetensors") for i in range(len(names))]
    for before, loader in pairwise([*loaders, apply]):
        page.wire(before, 0, loader, "deltas")
    page.wait_rows(apply, *names)
    width = page.tab.evaluate("(id) => sepmeTest.node(id).size[0]", apply)
    assert page.panel(apply).bounding_box()["width"] <= width
    rows = page.panel(apply).locator(".sepme-row")
    for i in range(len(names)):
        rows.nth(i).locator(".sepme-switch").click()
    page.sees(lambda: list(json.loads(page.value(apply, "toggles")).items()), [(name, 0) for name in names])
    sent = json.loads(page.api_prompt()[apply]["inputs"]["toggles"])
    assert list(sent) == names
    page.load_workflow(page.workflow())
    page.wait_rows(apply, *names)
    page.open_concepts()
    page.sees(lambda: set(names) <= set(page.tab.locator(".sepme-sidebar summary b").all_inner_texts()), True)
    assert page.tab.locator(".sepme b b, .sepme-name *").count() == 0


def test_unknown_names_are_kept_marked_and_can_be_forgotten(page: Page) -> None:
    apply, _ = chain(page, "star.safetensors")
    page.set(apply, "toggles", '{"picasso": 0.5, "Star": 0}')
    page.wait_rows(apply, "picasso", "Star")
    lost = page.row(apply, "picasso")
    assert "No delta of picasso" in lost.locator(".sepme-dot").get_attribute("title")
    expect(page.row(apply, "Star").locator(".sepme-lost")).to_have_count(0)  # names compare without case
    page.switch(apply, "Star")
    page.wait_toggles(apply, {"picasso": 0.5, "Star": 1})
    lost.locator(".sepme-drop").click()
    page.wait_toggles(apply, {"Star": 1})
    page.set(apply, "toggles", "no json")
    reset = page.panel(apply).locator("button:text-is('Start anew')")
    reset.wait_for()
    assert page.value(apply, "toggles") == "no json"  # nothing of the user's is thrown away unasked
    reset.click()
    page.wait_toggles(apply, {})


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
    page.tab.mouse.click(300, 820)  # the host looks for changes after a click
    page.wait_rows(apply, *(f"artist {i}" for i in range(12)), "circle")
    page.panel(apply).locator(".sepme-search").fill("1")
    page.wait_rows(apply, "artist 1", "artist 10", "artist 11")
    page.panel(apply).locator("button:text-is('None')").click()  # what is shown, no more
    page.sees(lambda: [n for n, s in json.loads(page.value(apply, "toggles")).items() if not s], ["artist 1", "artist 10", "artist 11"])


def test_a_delta_for_another_model_is_marked(page: Page, delta_folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    other = make_random_delta("moon", LAYERS)
    (delta_folder / "moon.safetensors").write_bytes(other.to_bytes())
    page.clear()  # the list is read again
    apply, _ = chain(page, "star.safetensors", "moon.safetensors")
    expect(page.panel(apply).locator(".sepme-note")).to_contain_text(f"moon is for {other.architecture}, the model is unet-384x7")
    expect(page.panel(apply).locator(".sepme-lost")).to_have_count(1)
    expect(page.row(apply, "moon").locator(".sepme-lost")).to_have_count(1)
