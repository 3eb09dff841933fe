"""A user's Friday night: the first erasure built by hand, switched, shared as a PNG, repaired by somebody without the delta."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui.graph import Graph
from comfyui.server import Server
from PIL import Image
from playwright.sync_api import expect

from browser.page import Page, run_prompt
from sepme.delta.concept_delta import ConceptDelta

pytestmark = pytest.mark.xdist_group("browser")

PROMPT = "a star"
SETTINGS = {"seed": 3, "steps": 8, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "normal"}
MISSING = "Missing concept deltas"


def pixels(server: Server, image: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB"))


def stock(server: Server) -> np.ndarray:
    """The picture of the model as it is."""
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    prompts = {"positive": graph.text(model[1], PROMPT)[0], "negative": graph.text(model[1], "")[0]}
    samples = graph.add("KSampler", model=model[0], latent_image=latent[0], denoise=1.0, **prompts, **SETTINGS)
    shown = graph.show(samples[0], model[2])
    (image,) = run_prompt(server, graph.prompt).images[shown]
    return image


def build(page: Page) -> dict[str, str]:
    """The workflow, node by node from the search box, wire by wire with the mouse."""
    places = {
        "SepMEDemoModel": ("SepME Demo Model", 120, 180), "SepMELoadDelta": ("SepME Load Delta", 120, 330),
        "SepMEApply": ("SepME Apply", 450, 180), "positive": ("CLIP Text Encode (Prompt)", 450, 470),
        "negative": ("CLIP Text Encode (Prompt)", 450, 690), "EmptyLatentImage": ("Empty Latent Image", 120, 560),
        "KSampler": ("KSampler", 880, 180), "VAEDecode": ("VAE Decode", 880, 560), "SaveImage": ("Save Image", 1120, 560),
    }  # fmt: skip
    ids = {name: page.search_node(words, x, y) for name, (words, x, y) in places.items()}
    for source, output, target, name in (
        ("SepMEDemoModel", 0, "SepMEApply", "model"), ("SepMELoadDelta", 0, "SepMEApply", "deltas"),
        ("SepMEDemoModel", 1, "positive", "clip"), ("SepMEDemoModel", 1, "negative", "clip"),
        ("SepMEApply", 0, "KSampler", "model"), ("positive", 0, "KSampler", "positive"), ("negative", 0, "KSampler", "negative"),
        ("EmptyLatentImage", 0, "KSampler", "latent_image"), ("KSampler", 0, "VAEDecode", "samples"),
        ("SepMEDemoModel", 2, "VAEDecode", "vae"), ("VAEDecode", 0, "SaveImage", "images"),
    ):  # fmt: skip
        page.drag_wire(ids[source], output, ids[target], name)
    settings = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": SETTINGS | {"control_after_generate": "fixed"}}
    for node, values in settings.items():
        for name, value in values.items():
            page.set(ids[node], name, value)
    page.set(ids["SepMELoadDelta"], "delta", "star.safetensors")
    page.text(ids["positive"]).click()
    page.tab.keyboard.type(PROMPT)
    page.tab.mouse.click(700, 840)
    page.wait_rows(ids["SepMEApply"], "star")
    return ids


@pytest.fixture(scope="module")
def shared(server: Server, open_page: Callable[..., Page]) -> dict[str, Any]:
    """A first use, up to the shared pictures; the PNGs with and without the delta inside."""
    page = open_page(server)
    ids = build(page)
    apply, save = ids["SepMEApply"], ids["SaveImage"]
    erased = page.queue()[save]["images"][0]
    page.switch(apply, "star")
    preserved = page.queue()[save]["images"][0]
    number = page.row(apply, "star").locator(".sepme-number")
    number.fill("0.9")
    number.press("Enter")
    card = page.part(ids["SepMELoadDelta"], "sepmeCard")
    card.locator("input[type=checkbox]").check()
    page.until("Object.values((app.rootGraph ?? app.graph).extra.sepme).some((r) => r.data)")
    travelling = page.queue()[save]["images"][0]
    assert page.own_errors() == []
    return {
        "erased": pixels(server, erased), "preserved": pixels(server, preserved), "travelling": pixels(server, travelling),
        "recipe_png": server.view(erased), "delta_png": server.view(travelling), "hash": page.value(ids["SepMELoadDelta"], "content_hash"),
    }  # fmt: skip


def test_a_switch_changes_the_picture(shared: dict[str, Any], server: Server) -> None:
    assert not np.array_equal(shared["erased"], shared["preserved"])
    assert not np.array_equal(shared["erased"], shared["travelling"])
    assert np.array_equal(shared["preserved"], stock(server))  # given back: bit for bit


@pytest.fixture
def elsewhere(empty_server: Server, open_page: Callable[..., Page]) -> Iterator[tuple[Page, Path]]:
    """The page of somebody who has no deltas, and the folder for them."""
    folder = empty_server.base / "models" / "sepme"
    for file in folder.glob("*"):
        file.unlink()
    page = open_page(empty_server)
    yield page, folder
    assert page.own_errors() == []


def test_png_with_the_delta_inside(shared: dict[str, Any], elsewhere: tuple[Page, Path]) -> None:
    page, folder = elsewhere
    page.drop_file("shared.png", shared["delta_png"], kind="image/png")
    dialog = page.dialog(MISSING)
    expect(dialog.locator(".sepme-missing")).to_have_count(1)
    expect(dialog).to_contain_text("star")
    dialog.locator("text=Install from this workflow").click()
    expect(dialog).to_have_count(0)  # nothing is missing any more: it closes by itself
    assert [p.name for p in folder.iterdir()] == ["star.safetensors"]
    (apply,) = page.ids("SepMEApply")
    page.wait_toggles(apply, {"star": 0.9})
    (images,) = (o["images"] for o in page.queue().values() if "images" in o)
    assert np.array_equal(pixels(page.server, images[0]), shared["travelling"])


def overlapping(page: Page) -> list[str]:
    """Pairs of nodes that lie on each other, as they are drawn."""
    pairs: list[str] = page.tab.evaluate("""() => {
      const nodes = app.canvas.graph.nodes, found = [];
      const box = (n) => { const e = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect();
        if (!e) return [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]];
        return [...app.clientPosToCanvasPos([e.left, e.top]), ...app.clientPosToCanvasPos([e.right, e.bottom])]; };
      for (const a of nodes) for (const b of nodes) { const [x, y] = [box(a), box(b)];
        if (a.id < b.id && x[0] < y[2] && y[0] < x[2] && x[1] < y[3] && y[1] < x[3]) found.push(`${a.type} ${b.type}`); }
      return found; }""")
    return pairs


def test_png_with_the_recipe_alone(shared: dict[str, Any], elsewhere: tuple[Page, Path]) -> None:
    page, folder = elsewhere
    page.drop_file("shared.png", shared["recipe_png"], kind="image/png")
    page.dialog(MISSING).locator("text=Train it again from its recipe").click()
    expect(page.dialog(MISSING)).to_have_count(0)
    kinds = [n["type"] for n in page.workflow()["nodes"]]
    assert "SepMELoadDelta" not in kinds
    assert {"SepMEConceptBook", "SepMETrain", "SepMESaveDeltas"} <= set(kinds)
    new = ("SepMEConceptBook", "SepMETrain", "SepMESaveDeltas")
    assert [pair for pair in overlapping(page) if any(kind in pair for kind in new)] == []
    page.queue()
    (file,) = folder.iterdir()
    assert ConceptDelta.load(file).content_hash() == shared["hash"]  # the very same delta


def test_renamed_and_other_deltas(page: Page, delta_folder: Path) -> None:
    loader = page.add("SepMELoadDelta", 200, 200, delta="star.safetensors")
    other = page.add("SepMELoadDelta", 600, 200, delta="tulip.safetensors")
    for node in (loader, other):
        page.sees(lambda node=node: len(page.value(node, "content_hash")), 64)
    page.until("Object.keys((app.rootGraph ?? app.graph).extra.sepme ?? {}).length === 2")
    saved, content_hash = page.workflow(), page.value(loader, "content_hash")
    (delta_folder / "star.safetensors").rename(delta_folder / "my-star.safetensors")
    page.load_workflow(saved)
    expect(page.part(loader, "sepmeCard")).to_contain_text("now my-star.safetensors")
    expect(page.dialog(MISSING)).to_have_count(0)  # the server finds it by its hash: no reason to ask
    page.clear()
    page.load_workflow(json.loads(json.dumps(saved).replace(page_hash(saved, other), "0" * 64)))
    dialog = page.dialog(MISSING)
    expect(dialog.locator(".sepme-missing")).to_have_count(2)
    dialog.locator("text=Use my-star.safetensors").click()
    expect(dialog.locator(".sepme-missing")).to_have_count(1)
    dialog.locator("text=Use another delta of this concept: tulip.safetensors").click()
    expect(dialog).to_have_count(0)
    assert (page.value(loader, "delta"), page.value(loader, "content_hash")) == ("my-star.safetensors", content_hash)
    assert page.value(other, "content_hash") == page_hash(saved, other)


def test_a_loader_of_a_file_that_came_later(page: Page, delta_folder: Path) -> None:
    """The page's list of deltas is older than the file, which the host offers after R."""
    (delta_folder / "star.safetensors").rename(delta_folder / "later.safetensors")
    loader = page.add("SepMELoadDelta", 200, 200, delta="later.safetensors")
    page.sees(lambda: len(page.value(loader, "content_hash")), 64)
    expect(page.part(loader, "sepmeCard")).to_contain_text("star")


def page_hash(workflow: dict[str, Any], loader: str) -> str:
    (node,) = (n for n in workflow["nodes"] if str(n["id"]) == loader)
    content_hash: str = node["widgets_values"][1]
    return content_hash
