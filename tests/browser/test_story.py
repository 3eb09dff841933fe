"""A user's Friday night: the first erasure built by hand, switched, shared as a PNG, repaired by somebody without the delta."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser.page import Page, run_prompt
from comfyui.graph import Graph
from comfyui.server import Server
from PIL import Image

pytestmark = pytest.mark.xdist_group("browser")

PROMPT = "a star"
SETTINGS = {"seed": 3, "steps": 8, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "normal"}


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
    page.settle()
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
    text = page.tab.evaluate_handle("(id) => sepmeTest.node(id).widgets[0].element", ids["positive"]).as_element()
    text.click()
    page.tab.keyboard.type(PROMPT)
    page.tab.mouse.click(700, 840)
    page.wait_rows(ids["SepMEApply"], "star")
    return ids


@pytest.fixture(scope="module")
def shared(server: Server, open_page: Callable[..., Page]) -> dict[str, Any]:
    """The story's first half; the PNGs with and without the delta inside."""
    page = open_page(server)
    ids = build(page)
    apply, save = ids["SepMEApply"], ids["SaveImage"]
    erased = page.queue()[save]["images"][0]
    page.switch(apply, "star")
    kept = page.queue()[save]["images"][0]
    page.switch(apply, "star")
    page.tab.mouse.click(700, 840)
    again = page.queue()[save]["images"][0] if page.toggles(apply) != {"star": 1} else erased
    card = page.tab.evaluate_handle("(id) => sepmeTest.node(id).sepmeCard", ids["SepMELoadDelta"]).as_element()
    card.query_selector("input[type=checkbox]").click()
    page.tab.wait_for_function("Object.values((app.rootGraph ?? app.graph).extra.sepme).some((r) => r.data)")
    page.set(ids["KSampler"], "seed", 4)
    travelling = page.queue()[save]["images"][0]
    assert page.own_errors() == []
    return {
        "erased": pixels(server, erased), "kept": pixels(server, kept), "again": pixels(server, again),
        "recipe_png": server.view(erased), "delta_png": server.view(travelling), "travelling": pixels(server, travelling),
    }  # fmt: skip


def test_a_switch_changes_the_picture(shared: dict[str, Any], server: Server) -> None:
    assert not np.array_equal(shared["erased"], shared["kept"])
    assert np.array_equal(shared["kept"], stock(server))  # given back: bit for bit
    assert np.array_equal(shared["again"], shared["erased"])


def missing(page: Page) -> Any:
    return page.tab.wait_for_selector("dialog[open]:has-text('Missing concept deltas')")


def test_png_with_the_delta_inside(shared: dict[str, Any], empty_server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(empty_server)
    folder = empty_server.base / "models" / "sepme"
    for file in folder.glob("*"):
        file.unlink()
    page.drop_file("shared.png", shared["delta_png"], kind="image/png")
    dialog = missing(page)
    assert "star" in dialog.inner_text()
    dialog.query_selector("text=Install from this workflow").click()
    page.tab.wait_for_selector("dialog[open]:has-text('Everything is there now')")
    page.tab.keyboard.press("Escape")
    assert [p.name for p in folder.iterdir()] == ["star.safetensors"]
    (images,) = (o["images"] for o in page.queue().values() if "images" in o)
    assert np.array_equal(pixels(empty_server, images[0]), shared["travelling"])
    assert page.own_errors() == []


def test_png_with_the_recipe_alone(shared: dict[str, Any], empty_server: Server, open_page: Callable[..., Page]) -> None:
    page = open_page(empty_server)
    folder = empty_server.base / "models" / "sepme"
    for file in folder.glob("*"):
        file.unlink()
    page.drop_file("shared.png", shared["recipe_png"], kind="image/png")
    missing(page).query_selector("text=Train it again from its recipe").click()
    page.settle(500)
    page.tab.keyboard.press("Escape")
    kinds = [n["type"] for n in page.workflow()["nodes"]]
    assert "SepMELoadDelta" not in kinds
    assert {"SepMEConceptBook", "SepMETrain", "SepMESaveDeltas"} <= set(kinds)
    page.queue()
    assert [p.name for p in folder.iterdir()] == ["star.safetensors"]
    assert page.own_errors() == []


def test_renamed_and_other_deltas(server: Server, open_page: Callable[..., Page], delta_folder: Path) -> None:
    page = open_page(server)
    loader = page.add("SepMELoadDelta", 200, 200, delta="star.safetensors")
    page.tab.wait_for_function("(id) => sepmeTest.value(id, 'content_hash').length === 64", arg=loader)
    saved = page.workflow()
    (delta_folder / "star.safetensors").rename(delta_folder / "my-star.safetensors")
    page.load_workflow(saved)
    page.settle(500)
    assert not page.tab.query_selector("dialog[open]")  # the server finds it by its hash: no reason to ask
    assert "now my-star.safetensors" in page.tab.evaluate("(id) => sepmeTest.node(id).sepmeCard.innerText", loader)
    page.clear()
    other = json.loads(json.dumps(saved).replace(page_hash(saved), "0" * 64))
    page.load_workflow(other)
    missing(page).query_selector("text=my-star.safetensors").click()
    page.tab.wait_for_selector("dialog[open]:has-text('Everything is there now')")
    page.tab.keyboard.press("Escape")
    assert page.value(loader, "delta") == "my-star.safetensors"
    assert page.value(loader, "content_hash") == page_hash(saved)


def page_hash(workflow: dict[str, Any]) -> str:
    (loader,) = (n for n in workflow["nodes"] if n["type"] == "SepMELoadDelta")
    content_hash: str = loader["widgets_values"][1]
    return content_hash
