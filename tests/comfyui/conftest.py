"""One real ComfyUI server, and one ComfyUI inside the process, for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfyui import inside as comfyui_inside
from comfyui.server import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> None:
    """ComfyUI's modules and this checkout as its node pack, without a model."""
    comfyui_inside.start(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def inside(comfy: None) -> comfyui_inside.Inside:
    return comfyui_inside.Inside()
