"""Registration: no Triton until a GPU's tensor comes, twice is harmless, and nothing that Triton does wrong costs a picture."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sepme.apply import ops
from sepme.apply import projector as runtime
from sepme.apply.composition import Composition
from sepme.apply.projector import KVProjector
from sepme.model.layers import projections

from .conftest import FOLDER

REGISTER = """
import importlib.util, sys
def load(name):
    spec = importlib.util.spec_from_file_location(name, sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
    sys.modules[name] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package
import torch
from sepme.apply import ops
for name in ("first", "first", "second"):
    package = load(name)
    package.register(ops)
    package.register(ops)
print("triton" in sys.modules)
context, weight = torch.randn(1, 3, 16), torch.randn(16, 16)
out = ops.project_kv(context, [weight], torch.zeros(0, 16), torch.zeros(1, 3, 0))
assert torch.equal(out, (context @ weight.T).reshape(-1))
print([n for n in sys.modules if n.endswith((".projection", ".rows"))])
print(torch._C._dispatch_has_kernel_for_dispatch_key("sepme::project_kv", "CUDA"))
print(ops.why_not((), context=context))
"""


def test_registering_imports_no_triton_and_may_be_repeated() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTER, str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False", "[]", "True", "there is no kernel for cpu"]


@pytest.fixture
def on_cpu(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The interpreted kernels, offered for CPU tensors as they are for a GPU's."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = loaded["interpreter"]
    monkeypatch.setattr(kernels.package, "_failure", None)
    monkeypatch.setattr(kernels.package, "_unsupported", lambda device: None)
    ops.accelerate("cpu", kernels.package.unavailable)
    yield SimpleNamespace(
        package=kernels.package,
        projection=kernels.projection,
        project_kv=kernels.package._guarded(ops, "project_kv", ops.PROJECT_KV, ("context", "weights")),
        add_to_rows=kernels.package._guarded(ops, "add_to_rows", ops.ADD_TO_ROWS, ("base",)),
    )
    del ops._accelerators["cpu"]


def test_the_projector_by_kernels(on_cpu: SimpleNamespace, host: Any, shapes_of: Any, make_random_delta: Any, monkeypatch: Any) -> None:
    """fused is one launch; auto, with an untouched row, adds into the touched one; both agree with the plain bodies."""
    shapes = shapes_of(host)
    composition = Composition((make_random_delta("star", shapes, rank=4, seed=1), make_random_delta("moon", shapes, rank=3, seed=2)))
    context = host.encode(["a star", "cat"]).context
    calls: list[str] = []

    def counted(name: str) -> Callable[..., torch.Tensor]:
        return lambda *args: calls.append(name) or getattr(on_cpu, name)(*args)  # type: ignore[func-returns-value]

    for name in ("project_kv", "add_to_rows"):
        monkeypatch.setattr(runtime, name, counted(name))
    for table, backend, expected in (
        ([[1.0, 0.5], [0.0, -1.0]], "fused", {"project_kv": 1}),
        ([[1.0, 0.5], [0.0, 0.0]], "auto", {"add_to_rows": len(shapes)}),
    ):
        found = {}
        for way in (backend, "eager", "exact"):
            calls.clear()
            with torch.no_grad(), KVProjector(host.attention_layers(), composition, backend=way).attached(torch.tensor(table)):
                found[way] = {n: m(context) for n, m in projections(host.attention_layers()).items()}
            if way == backend:
                assert {c: calls.count(c) for c in calls} == expected
        for name, out in found[backend].items():
            for way in ("eager", "exact"):
                assert (out - found[way][name]).norm() <= 1e-6 * out.norm()


def test_inputs_outside_the_constraints_take_the_eager_body(on_cpu: SimpleNamespace) -> None:
    weights, h = [torch.randn(24, 40)], torch.randn(1, 3, 2)  # 24 and 40 are no multiples of 16
    up, context = torch.randn(2, 24), torch.randn(1, 3, 40)
    assert torch.equal(on_cpu.project_kv(context, weights, up, h), ops.project_kv_eager(context, weights, up, h))
    wide = [w.double() for w in weights]
    assert torch.equal(
        on_cpu.project_kv(context.double(), wide, up.double(), h), ops.project_kv_eager(context.double(), wide, up.double(), h)
    )
    base, rows = torch.randn(2, 3, 24, dtype=torch.float64), torch.tensor([1])
    assert torch.equal(on_cpu.add_to_rows(base, h, up, rows), ops.add_to_rows_eager(base, h, up, rows))


def test_a_launch_that_fails_costs_one_warning(on_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """No C compiler, an unknown driver: the plain bodies from then on; out of memory is the caller's."""
    tries: list[int] = []

    def broken(*args: Any) -> None:
        tries.append(1)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(on_cpu.projection, "project_kv", broken)
    context, weights, up, h = torch.randn(1, 3, 32), [torch.randn(16, 32)], torch.randn(2, 16), torch.randn(1, 3, 2)
    with caplog.at_level(logging.WARNING, "sepme"):
        for _ in range(3):
            assert torch.equal(on_cpu.project_kv(context, weights, up, h), ops.project_kv_eager(context, weights, up, h))
    assert len(tries) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "SepME goes on without its Triton kernels: a launch failed: Failed to find C compiler."
    ]
    assert "Failed to find C compiler" in str(ops.why_not(ops.PROJECT_KV, context=context, weights=weights))

    def full(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(on_cpu.package, "_failure", None)
    monkeypatch.setattr(on_cpu.projection, "project_kv", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        on_cpu.project_kv(context, weights, up, h)


def test_reasons(on_cpu: SimpleNamespace, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    package = loaded["gpu"].package
    device = torch.device("cuda", 0)
    package._unsupported.cache_clear()
    monkeypatch.setenv("SEPME_KERNELS", "0")
    assert package.unavailable(device) == "they are switched off by SEPME_KERNELS=0"
    monkeypatch.delenv("SEPME_KERNELS")
    for capability, reason in (((7, 5), "they need compute capability 8.0, this GPU has 7.5"), ((8, 0), None), ((12, 1), None)):
        package._unsupported.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert package.unavailable(device) == reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for name, reason in (
        ("gfx942:sramecc+:xnack-", None),
        ("gfx1100", None),
        ("gfx1030", "gfx1030 has no matrix instructions that they use"),
    ):
        package._unsupported.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=name: SimpleNamespace(gcnArchName=found))
        assert package.unavailable(device) == reason
    package._unsupported.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    package._import_failure.cache_clear()
    assert "Triton cannot be imported" in str(package.unavailable(device))
    package._import_failure.cache_clear()
