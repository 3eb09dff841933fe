"""The kernels of this checkout, twice: run by Triton's interpreter on CPU tensors, and as they are compiled for a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
FOLDER = Path(__file__).parents[2] / "kernels"


def load(name: str, interpret: bool) -> SimpleNamespace:
    """The package ``kernels/`` under another name: ``@triton.jit`` decides at import whether a kernel is interpreted."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    assert spec is not None
    assert spec.loader is not None
    package: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    with pytest.MonkeyPatch.context() as patch:
        if interpret:
            patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(package)
        modules = {n: importlib.import_module(f"{name}.{n}") for n in ("projection", "rows", "configs")}
    return SimpleNamespace(package=package, interpret=interpret, device="cpu" if interpret else "cuda", **modules)


WAYS = [pytest.param("interpreter", id="interpreter")]
if torch.cuda.is_available():
    WAYS.append(pytest.param("gpu", id="gpu"))


@pytest.fixture(scope="session")
def loaded() -> dict[str, SimpleNamespace]:
    return {"interpreter": load("kernels_interpreted", True), "gpu": load("kernels_compiled", False)}


@pytest.fixture(params=WAYS)
def kernels(request: pytest.FixtureRequest, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules, and the ``device`` on which they run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "interpreter" else "0")
    return loaded[request.param]


@pytest.fixture
def compiled(loaded: dict[str, SimpleNamespace]) -> SimpleNamespace:
    return loaded["gpu"]
