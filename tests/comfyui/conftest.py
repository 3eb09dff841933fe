"""One real ComfyUI server for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfyui.server import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
