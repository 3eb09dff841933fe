"""A real server with deltas of the embedded model, and a real Chromium that looks at its page; closed after this folder's last test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui.conftest import checkpoint_server, lessened_pack  # noqa: F401 (a fixture of these tests too)
from comfyui.graph import Graph
from comfyui.server import Server, serving
from playwright.sync_api import Error

from browser.chromium import Chromium, launched
from browser.page import Page, run_prompt

LIMIT = 240  # seconds of a test; a page that hangs is waited for no longer
BOOK = """
concepts:
  - {name: star, prompts: [star, a star, a picture of a star, a drawing of a star]}
  - {name: tulip, prompts: [tulip, a tulip, a picture of a tulip, a drawing of a tulip]}
  - {name: openmoji, prompts: [openmoji style, an openmoji picture, in openmoji style]}
"""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the deltas of star, tulip and openmoji in models/sepme, made on it."""
    with serving(tmp_path_factory.mktemp("browser"), pack=lessened_pack(tmp_path_factory.mktemp("pack"))) as running:
        graph = Graph()
        model = graph.add("SepMEDemoModel")
        book = graph.add("SepMEConceptBook", book=BOOK)
        made = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=book[0], objective="closed-form", nearby=0)
        graph.add("SepMESaveDeltas", deltas=made[0])
        run = run_prompt(running, graph.prompt)
        assert run.error is None, run.message
        yield running


@pytest.fixture(scope="package")
def empty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another user's, without deltas."""
    with serving(tmp_path_factory.mktemp("browser-other")) as running:
        yield running


@pytest.fixture(scope="package")
def chrome() -> Iterator[Chromium]:
    with launched() as browser:
        yield browser


@pytest.fixture(autouse=True)
def _watched(chrome: Chromium) -> Iterator[None]:
    with chrome.watched(LIMIT):
        yield


@pytest.fixture(scope="package")
def open_page(chrome: Chromium) -> Iterator[Callable[..., Page]]:
    """``open_page(server, vue=False, locale="en", size=(1400, 900))``: the page of a server; the same one for the same arguments.

    One that did not come up fails the tests that need it, without being waited for again.
    """
    pages: dict[Any, Page] = {}
    failed: dict[Any, str] = {}

    def build(server: Server, vue: bool = False, locale: str = "en", size: tuple[int, int] = (1400, 900)) -> Page:
        key = (server.port, vue, locale, size)
        server.check()
        if key in pages and not pages[key].answers():
            pages.pop(key).close()
        if key in failed:
            pytest.fail(failed[key])
        if key not in pages:
            pages[key] = Page(chrome, server, vue, locale, size)
            try:
                pages[key].load()
            except Error as error:
                log = server.log.read_text(errors="replace")[-3000:]
                failed[key] = "\n".join([f"The page did not come up: {error}", *pages[key].errors[-5:], "The server's log:", log])
                pytest.fail(failed[key])
        return pages[key].clear()

    yield build
    for page in pages.values():
        page.close()


@pytest.fixture(params=["canvas", "nodes2"])
def page(request: pytest.FixtureRequest, server: Server, open_page: Callable[..., Page]) -> Iterator[Page]:
    """The page with an empty workflow, in either renderer. Errors of our own scripts fail the test."""
    page = open_page(server, vue=request.param == "nodes2")
    yield page
    assert page.own_errors() == []


@pytest.fixture
def delta_folder(server: Server) -> Iterator[Path]:
    """models/sepme; afterwards as it was."""
    folder = server.base / "models" / "sepme"
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield folder
    shutil.rmtree(folder)
    for name, data in before.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
