"""The benchmarks: that their sides compute what they are said to, that what is counted is right; no time is asserted."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sepme import cli
from sepme.apply.composition import Composition
from sepme.apply.projector import KVProjector
from sepme.bench import alternate, kernel, models, overhead, toggle
from sepme.bench.counting import count
from sepme.bench.solver import SolverOptions, run, sd15_shapes
from sepme.errors import SepMEError


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def sepme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sepme", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


# --- counting and timing


def test_counts() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert count(lambda: (a @ b).T.clone()) == {"operators": 2, "flops": 2 * 3 * 4 * 5, "bytes": 4 * (12 + 20 + 15) + 4 * 30}
    assert count(lambda: a.T.view(4, 3)) == {"operators": 0, "flops": 0, "bytes": 0}


def test_rounds_divide_by_the_same_rounds_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order, prepared = [0.0], [], []
    monkeypatch.setattr(overhead, "seconds", lambda run, clock: run())
    pace = iter([1.0, 2.0, 4.0, 8.0, 16.0] * 3)  # the machine gets slower and slower

    def side(name: str, factor: float) -> Callable[[], float]:
        return lambda: order.append(name) or factor * clock[0]  # type: ignore[func-returns-value]

    def progress(what: str, done: int, total: int) -> None:
        clock[0] = next(pace)

    sides = {"stock": side("stock", 1), "a": side("a", 0.5), "b": side("b", 3)}
    result = overhead.rounds(sides, 5, progress, prepared.append)
    assert {n: r["ratio"] for n, r in result.items()} == {"stock": 1.0, "a": 0.5, "b": 3.0}
    assert result["a"]["low"] == result["a"]["high"] == 0.5
    assert prepared == order
    assert len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) > 2  # every side has been first and last


# --- overhead and toggling


@pytest.fixture(scope="module")
def demo() -> models.Subject:
    return models.subject("demo")


def test_sides_draw_what_they_should(demo: models.Subject) -> None:
    """Nothing switched on is stock bit for bit; merged, PEFT's and ours are one increment, up to rounding."""
    deltas = models.random_deltas(demo.layers, 3)
    stock = demo.step(demo.latents, 500)
    with models.barely_cached(demo.layers):
        assert torch.equal(demo.step(demo.latents, 500), stock)
        assert torch.equal(demo.step(demo.latents, 500), stock)
    with KVProjector(demo.layers, Composition(deltas)).attached(models.strengths(3)):
        ours = demo.step(demo.latents, 500)
    merged, adapted = demo.twin(), demo.twin()
    models.merge(merged.unet, deltas)
    models.add_adapters(adapted.unet, deltas)
    change = (ours - stock)[1].abs().max()
    assert torch.equal(ours[0], stock[0])
    assert change > 1e-3
    for other in (merged, adapted):
        assert (other.step(demo.latents, 500)[1] - ours[1]).abs().max() < 1e-3 * change
    assert torch.equal(demo.step(demo.latents, 500), stock)  # the twins share no module with it


def test_overhead(demo: models.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on fewer operators and FLOPs than stock, however many concepts; PEFT's grow with them."""
    monkeypatch.setattr(overhead, "subject", lambda name: demo)
    result = overhead.run("demo", (0, 1, 5), steps=2, number=1)
    steps = result["per_step"]
    assert set(result["sides"]) == set(steps)
    for name in ("ours_0", "ours_1", "ours_5"):
        assert steps[name]["operators"] < steps["stock"]["operators"]
        assert steps[name]["flops"] == steps["stock_kept"]["flops"] < steps["stock"]["flops"]
    assert steps["ours_1"]["operators"] == steps["ours_5"]["operators"] == result["ops_per_step_ours"]
    assert (
        steps["lora_merged_5"]["flops"] == steps["stock"]["flops"] < steps["peft_unmerged_1"]["flops"] < steps["peft_unmerged_5"]["flops"]
    )
    assert steps["context_1"] == steps["context_5"] == steps["stock"]  # operators, arithmetic and bytes of a step
    assert result["ops_per_step_context"] == result["ops_per_step_stock"]
    assert result["overhead_ratio_context_n5"] > 0
    assert result["flops_ratio_n5"] == steps["ours_5"]["flops"] / steps["stock"]["flops"]
    assert result["overhead_ratio_n5"] == result["sides"]["ours_5"]["ratio"] > 0
    widths = sum(getattr(layer, p).weight.shape[0] for layer in demo.layers.values() for p in ("to_k", "to_v"))
    assert result["cache_bytes"] == 4 * (
        demo.context.numel() + demo.context.shape[1] * 5 * models.RANK + 2 * demo.context.shape[1] * widths
    )
    assert result["delta_bytes"] > 0


def test_sides_can_be_chosen(demo: models.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "subject", lambda name: demo)
    monkeypatch.setattr(overhead, "add_adapters", None)  # what is not run is not made
    assert set(overhead.run("demo", (0, 2), steps=2, number=1, only=("lora_merged_2",))["sides"]) == {"stock", "lora_merged_2", "ours_2"}
    with pytest.raises(SepMEError, match="no side 'peft'; choose from stock, stock_kept, ours_0, ours_2"):
        overhead.run("demo", (0, 2), steps=2, number=1, only=("peft",))


def test_toggle_work_is_all_but_the_models_own(demo: models.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = models.random_deltas(demo.layers, 2)
    calls: list[str] = []
    for name, module in KVProjector(demo.layers, Composition(deltas)).modules.items():
        monkeypatch.setattr(module, "forward", lambda c, name=name, forward=module.forward: calls.append(name) or forward(c))
    work = toggle.stubbed(demo.layers, deltas, demo.context)
    before = len(calls)
    real, added = importlib.import_module("sepme.apply.projector").add_to_rows, []

    def add(base: torch.Tensor, *args: Any) -> torch.Tensor:
        found = base.clone()
        out: torch.Tensor = real(base, *args)
        assert out is base  # in place, as on a model whose projections are plain products
        added.append(out - found)
        return out

    monkeypatch.setattr("sepme.apply.projector.add_to_rows", add)
    with torch.no_grad():
        work(0.0)
        work(1.0)
    assert len(calls) == before  # no projection of the model's ran
    assert len(added) == 2 * before
    assert all((b - a).abs().max() > 1e-3 * b.abs().max() for a, b in zip(added[:before], added[before:], strict=True))


def test_toggle(demo: models.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toggle, "subject", lambda name: demo)
    result = toggle.run("demo", pairs=1)
    assert result["toggle_speedup_vs_lora"] == result["seconds_work"]["lora"] / result["seconds_work"]["ours"]
    assert result["toggle_speedup_end_to_end"] == result["seconds_to_first_step"]["lora"] / result["seconds_to_first_step"]["ours"]


# --- kernel


@pytest.mark.parametrize(
    ("model", "rows", "gflop", "h100", "rtx4090"),
    [("sd15", 2, 5.9, 13.8, 45.9), ("sd15", 8, 23.6, 23.9, 143), ("sdxl", 2, 105, 219, 728), ("sdxl", 8, 420, 424, 2542)],
)
def test_roofline(model: str, rows: int, gflop: float, h100: float, rtx4090: float) -> None:
    found = kernel.roofline(model, rows, 0)
    assert found["flops"] / 1e9 == pytest.approx(gflop, rel=0.01)
    assert 1e6 * found["least_seconds"]["H100 SXM"] == pytest.approx(h100, rel=0.01)
    assert 1e6 * found["least_seconds"]["RTX 4090"] == pytest.approx(rtx4090, rel=0.01)
    more = kernel.roofline(model, rows, 800)
    assert more["bytes"] > found["bytes"]
    assert more["flops"] / found["flops"] == pytest.approx((kernel.SIZES[model][0] + 800) / kernel.SIZES[model][0])


def test_sizes_are_the_models() -> None:
    assert [(d_in, len(d), sum(d)) for d_in, d in kernel.SIZES.values()] == [(768, 32, 24960), (2048, 140, 166400)]


@pytest.mark.parametrize("rank", [0, 8])
def test_sides_of_the_kernel_compute_the_same(rank: int) -> None:
    problem = kernel.Problem(64, (32, 48), 4, rank, "cpu", torch.float32)
    stock = problem.stock()
    for name, side in problem.sides().items():
        for out, base in zip(side(), stock, strict=True):
            assert name == "merged_weights" or torch.allclose(out[:2], base[:2], rtol=1e-5, atol=1e-6)
    fused, merged = problem.fused(), problem.merged_weights()
    for name in ("naive", "eager", "exact"):
        for out, expected, weighed in zip(getattr(problem, name)(), fused, merged, strict=True):
            assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
            assert torch.allclose(out[2:], weighed[2:], rtol=1e-4, atol=1e-5)
    assert rank == 0 or not torch.allclose(fused[0], stock[0], atol=1e-2)
    timed = kernel.compare(64, (32, 48), 2, rank, "cpu", torch.float32, 2)
    assert timed["stock"]["ratio"] == 1
    assert set(timed) == {"stock", "naive", "merged_weights", "eager", "exact", "fused"}


def test_kernel_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, out, _ = sepme(monkeypatch, capsys, "bench", "kernel", "--aot", "--target", "gfx1100", "--json", "--out", str(tmp_path))
    assert code == 0
    data = json.loads(out)
    assert json.loads((tmp_path / "kernel-aot.json").read_text()) == data
    keys = {"target", "kernel", "dtype", "config", "registers", "spills", "shared_bytes", "tensor_core_instructions"}
    assert all(keys <= set(r) for r in data["targets"])
    assert {r["dtype"] for r in data["targets"]} == {"fp16", "bf16", "fp32"}
    assert {(r["model"], r["rows"], r["rank"]) for r in data["roofline"]} >= {("sd15", 2, 0), ("sdxl", 16, 800)}
    code, _, err = sepme(monkeypatch, capsys, "bench", "kernel", "--aot", "--target", "sm10")
    assert (code, "There is no target 'sm10'" in err) == (2, True)
    if not torch.cuda.is_available():
        code, _, err = sepme(monkeypatch, capsys, "bench", "kernel")
        assert (code, "no GPU that PyTorch can use here" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "sepme_kernels.aot", None)
    code, _, err = sepme(monkeypatch, capsys, "bench", "kernel", "--aot")
    assert (code, "pip install 'comfyui-sepme[kernels]'" in err) == (2, True)


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    for command in ("overhead", "toggle"):
        code, _, err = sepme(monkeypatch, capsys, "bench", command, "--model", "huge")
        assert (code, err.splitlines()[-1]) == (2, "sepme: There is no model 'huge' to measure on; choose one of demo, sd15.")
        code, _, err = sepme(monkeypatch, capsys, "bench", command, "--comfyui", str(tmp_path))
        assert (code, "holds no ComfyUI (main.py is missing)" in err) == (2, True)


def test_bench_solver_gives_all_keys() -> None:
    data = run(SolverOptions(budget=20, sizes=((2, 6), (3, 8), (60, 300)), pairs=1, concepts=12, d_ins=(24,), closed_form=2))
    assert data["solver_speedup_vs_sympy"] > 0
    assert data["solver_residual"] <= 1e-10
    assert set(data["plan_1000_seconds"]) == {"24"}
    assert data["closed_form_100_seconds"] > 0
    assert data["delta_bytes_sd15_rank8"] <= 500_000
    for size in data["solver"]:
        assert size["ours"]["condition"] == pytest.approx(1, abs=1e-10)
    json.dumps(data)
    assert sum(o for o, _ in sd15_shapes().values()) == 24_960
    assert len(sd15_shapes()) == 32


def test_sides_are_timed_by_turns() -> None:
    calls: list[str] = []
    timing = alternate(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3)
    assert "".join(calls) == "abbaab"
    assert min(timing) > 0
