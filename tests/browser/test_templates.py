"""Templates for one's own checkpoint run from the page; nothing in them overlaps, and all fits on a screen at half size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui.conftest import NAME
from comfyui.graph import Graph
from comfyui.server import ROOT, Server

from browser.page import Page, run_prompt
from browser.test_first_use import overlapping, pixels

pytestmark = pytest.mark.xdist_group("browser")

SIZE = (1500, 950)
BARS = (70, 90)  # pixels of the page's own bars, left and above
TEMPLATES = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "example_workflows").glob("*.json"))}
RUN = [name for name in TEMPLATES if name[0] in "678"]


@pytest.fixture(scope="module")
def saved(checkpoint_server: Server) -> None:
    """Two concepts in models/sepme, worked out for the checkpoint as the templates do, which then need not do it again."""
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=NAME)
    first = graph.add("SepMEErase", model=model[0], clip=model[1], concepts="van gogh")
    made = graph.add("SepMEErase", model=model[0], clip=model[1], concepts="picasso", deltas=first[1])
    graph.add("SepMESaveDeltas", deltas=made[1], filename_prefix="template-")
    run = run_prompt(checkpoint_server, graph.prompt)
    assert run.error is None, run.message


def shrink(page: Page) -> None:
    """A picture that a busy CPU draws in seconds: small, of few steps."""
    for kind, values in {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2}, "SepMECompare": {"steps": 2}}.items():
        for node in page.ids(kind):
            for name, value in values.items():
                page.set(node, name, value)


def prepare(page: Page) -> None:
    """What a user chooses: checkpoint and saved concepts; small pictures, for a busy CPU."""
    for loader in page.ids("CheckpointLoaderSimple"):
        page.set(loader, "ckpt_name", NAME)
    for loader, name in zip(page.ids("SepMELoadDelta"), ("van-gogh", "picasso"), strict=False):
        page.set(loader, "delta", f"template-{name}.safetensors")
    shrink(page)
    for area in page.ids("ConditioningSetArea"):
        for name in ("width", "height", "x"):
            page.set(area, name, page.value(area, name) // 8)
    for latent in page.ids("EmptyLatentImage"):
        page.set(latent, "width", 128 if page.ids("ConditioningSetArea") else 64)
    page.frames()


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("name", RUN)
def test_template(checkpoint_server: Server, open_page: Callable[..., Page], saved: None, name: str, vue: bool) -> None:
    page = open_page(checkpoint_server, vue=vue, size=SIZE)
    page.load_workflow(TEMPLATES[name], here=True)
    prepare(page)
    pictures = [pixels(checkpoint_server, image) for out in page.queue().values() for image in shown(out)]
    assert all(p.std() > 0 for p in pictures)
    assert len(pictures) == {"6": 3, "7": 1, "8": 3}[name[0]]
    photograph(page, name)
    check_layout(page)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_layout(checkpoint_server: Server, open_page: Callable[..., Page], vue: bool) -> None:
    """Of the templates that train, which other tests run."""
    page = open_page(checkpoint_server, vue=vue, size=SIZE)
    page.load()  # without the pictures that nodes of the same number have drawn before
    found = {}
    for name in TEMPLATES:
        if name[0] in "12345":
            page.load_workflow(TEMPLATES[name], here=True)
            page.frames()
            photograph(page, name)
            half(page)
            found[name] = overlapping(page), outside(page)
    assert found == dict.fromkeys(found, ([], []))


def photograph(page: Page, name: str) -> None:
    """Where somebody wants to look at it, a picture of a template at half size."""
    if folder := os.environ.get("SEPME_PICTURES"):
        half(page)
        page.picture(Path(folder) / f"template-{name[0]}-{'nodes2' if page.vue else 'canvas'}.png")


def check_layout(page: Page) -> None:
    """No node lies on another, and none reaches beyond the window at half size."""
    half(page)
    assert overlapping(page) == []
    assert outside(page) == []


def shown(out: dict[str, Any]) -> list[dict[str, str]]:
    compared = [image for pair in out.get("sepme_compare", ()) for images in pair.values() for image in images]
    return [*out.get("images", ()), *compared]


def half(page: Page) -> None:
    """At half size, the first node at the upper left."""
    page.tab.evaluate(
        """([left, top]) => { const at = app.canvas.graph.nodes.map((n) => n.pos); app.canvas.ds.scale = 0.5;
        app.canvas.ds.offset = [2 * left - Math.min(...at.map((p) => p[0])), 2 * top - Math.min(...at.map((p) => p[1])) + 30];
        app.canvas.setDirty(true, true); }""",
        list(BARS),
    )
    page.frames()


def outside(page: Page) -> list[str]:
    """Nodes that reach beyond the window."""
    found: list[str] = page.tab.evaluate(
        """([width, height]) => app.canvas.graph.nodes.filter((n) => {
        const e = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect();
        const [right, bottom] = e ? [e.right, e.bottom] : app.canvasPosToClientPos([n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
        return right > width || bottom > height; }).map((n) => n.type)""",
        list(SIZE),
    )
    return found
