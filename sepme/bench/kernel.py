"""The kernels: compiled ahead of time for every GPU family (no GPU needed), and timed on the GPU at hand against what they replace."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..apply import ops
from ..errors import SepMEError
from ..progress import OnProgress, silent

# d_in and d_out of to_k and to_v of every attn2 layer, in the order of the forward pass
SIZES: dict[str, tuple[int, list[int]]] = {
    "sd15": (768, [n for width, layers in ((320, 2), (640, 2), (1280, 6), (640, 3), (320, 3)) for n in [width] * 2 * layers]),
    "sdxl": (2048, [n for width, layers in ((640, 4), (1280, 60), (640, 6)) for n in [width] * 2 * layers]),
}
TOKENS = 77
# bytes and half-precision products a second, from the makers' data sheets
PARTS = {"H100 SXM": (3.35e12, 989e12), "RTX 4090": (1.008e12, 165e12), "A100 80GB": (2.04e12, 312e12), "MI300X": (5.3e12, 1307e12)}


def roofline(model: str, rows: int, rank: int) -> dict[str, Any]:
    """Bytes and floating-point operations that K and V of a batch need in half precision, and the least time for them.

    Computed, not measured: ``N (K + R) 2 + 2 M K + 4 M R + 2 M N`` bytes and ``2 M N (K + R)`` operations for M tokens, K = d_in,
    N = Σ d_out, rank R.
    """
    d_in, d_outs = SIZES[model]
    m, n = rows * TOKENS, sum(d_outs)
    moved = 2 * n * (d_in + rank) + 2 * m * d_in + 4 * m * rank + 2 * m * n
    flops = 2 * m * n * (d_in + rank)
    least = {part: max(moved / memory, flops / matrix) for part, (memory, matrix) in PARTS.items()}
    return {"model": model, "rows": rows, "rank": rank, "bytes": moved, "flops": flops, "least_seconds": least}


def _package(name: str) -> Any:
    """A module of the kernels, which need Triton.

    Raises:
        SepMEError: the kernels or Triton are missing.
    """
    try:
        return importlib.import_module(f"sepme_kernels{name}")
    except ImportError as error:
        raise SepMEError(f"The kernels need Triton ({error}); on Linux run: pip install 'comfyui-sepme[kernels]'.") from None


def aot(targets: Sequence[str] = (), widths: Sequence[int] = (768,), on_progress: OnProgress = silent) -> dict[str, Any]:
    """Compile every configuration for every family.

    Returns:
        ``targets``: one report a case (see ``kernels/aot.py``); ``ok``; ``roofline``; the versions.

    Raises:
        SepMEError: Triton is missing, an unknown target.
    """
    module = _package(".aot")
    if unknown := set(targets) - set(module.TARGETS):
        raise SepMEError(f"There is no target {sorted(unknown)[0]!r}; choose from {', '.join(module.TARGETS)}.")
    cases, reports = list(module.cases(targets or module.TARGETS, widths)), []
    for i, case in enumerate(cases):
        on_progress("Compiled", i, len(cases))
        try:
            reports.append(case.report())
        except RuntimeError as error:
            failed = (str(error).splitlines() or ["no message"])[0][:200]
            reports.append({"target": case.target, "kernel": case.kernel, "dtype": str(case.dtype), "ok": False, "error": failed})
    on_progress("Compiled", len(cases), len(cases))
    return {
        "targets": reports,
        "ok": all(r["ok"] for r in reports),
        "roofline": [roofline(model, rows, rank) for model in SIZES for rows in (2, 8, 16) for rank in (0, 8, 80, 800)],
        "versions": {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__},
    }


class Problem:
    """Context, weights, Y and H of one size, and every way to compute K and V from them. All rows but the first half are touched."""

    def __init__(self, d_in: int, d_outs: Sequence[int], rows: int, rank: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, kind: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(kind)

        self.context = draw(rows, TOKENS, d_in)
        self.weights = [draw(n, d_in, scale=d_in**-0.5) for n in d_outs]
        self.up = draw(rank, sum(d_outs), scale=max(rank, 1) ** -0.5)
        self.ups = [u.float().contiguous() for u in self.up.split(list(d_outs), dim=1)]
        self.down = draw(rank, d_in, scale=d_in**-0.5)
        self.rows = torch.arange(rows // 2, rows, device=device)
        self.h = torch.zeros(rows, TOKENS, rank, device=device)
        self.h[self.rows] = self.context[self.rows].float() @ self.down.float().T
        self.mask = torch.zeros(rows, 1, 1, device=device, dtype=dtype)
        self.mask[self.rows] = 1
        self.touched = self.h[self.rows].contiguous()
        self.merged = [(w.float() + (u.T @ self.down.float())).to(dtype) for w, u in zip(self.weights, self.ups, strict=True)]
        self.halves = [u.to(dtype).T.contiguous() for u in self.ups]

    def stock(self) -> list[Tensor]:
        """The projections alone, nothing erased."""
        return [linear(self.context, weight) for weight in self.weights]

    def merged_weights(self) -> list[Tensor]:
        """The projections with the deltas merged into the weights: no gate, no toggles."""
        return [linear(self.context, weight) for weight in self.merged]

    def naive(self) -> list[Tensor]:
        """A delta beside every projection, as PEFT's unmerged adapters do it: down, mask, up, add."""
        pairs = zip(self.weights, self.halves, strict=True)
        return [linear(self.context, weight) + linear(linear(self.context, self.down) * self.mask, up) for weight, up in pairs]

    def eager(self) -> list[Tensor]:
        """All rows by the reference operator."""
        return self._split(ops.project_kv_eager(self.context, self.weights, self.up, self.h))

    def exact(self) -> list[Tensor]:
        """Stock projections, then the change of the touched rows."""
        pairs = zip(self.weights, self.ups, strict=True)
        return [ops.add_to_rows(linear(self.context, weight), self.touched, up, self.rows) for weight, up in pairs]

    def fused(self) -> list[Tensor]:
        """All rows by the kernel, in one launch."""
        return self._split(ops.project_kv(self.context, self.weights, self.up, self.h))

    def _split(self, flat: Tensor) -> list[Tensor]:
        return ops.split(flat, self.weights, *self.context.shape[:2])

    def sides(self) -> dict[str, Callable[[], Any]]:
        """What is timed, by name."""
        return {name: getattr(self, name) for name in ("stock", "naive", "merged_weights", "eager", "exact", "fused")}


def timer(device: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one call with a cold L2 cache: by events on a GPU, by the clock elsewhere."""
    if device != "cuda":

        def clocked(call: Callable[[], Any]) -> float:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        return clocked
    flush = torch.empty(512 << 20, dtype=torch.int8, device=device)

    def timed(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def compare(
    d_in: int, d_outs: Sequence[int], rows: int, rank: int, device: str, dtype: torch.dtype, repeats: int
) -> dict[str, dict[str, float]]:
    """Median seconds of every side, taken by turns after a warm-up, and their ratio to stock."""
    sides, measure = Problem(d_in, d_outs, rows, rank, device, dtype).sides(), timer(device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + math.ceil(repeats / 5)):
        for name, side in sides.items():
            taken = measure(side)
            if i >= math.ceil(repeats / 5):
                times[name].append(taken)
    stock = median(times["stock"])
    return {name: {"seconds": median(t), "ratio": median(t) / stock} for name, t in times.items()}


def configurations(d_in: int, d_outs: Sequence[int], rows: int, rank: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the fused kernel with every configuration of the table, whatever family it is for; fastest first."""
    table, projection = _package(".configs"), _package(".projection")
    problem, measure = Problem(d_in, d_outs, rows, rank, "cuda", dtype), timer("cuda")
    result = []
    for config in {c for kinds in table.load().values() for c in kinds["float32" if dtype == torch.float32 else "half"]}:

        def call(config: Any = config) -> None:
            projection.project_kv(problem.context, problem.weights, problem.up, problem.h, config)

        try:
            call()
            seconds = median(measure(call) for _ in range(repeats))
        except Exception as error:  # another family's tile may not fit this part
            result.append({"config": vars(config), "error": str(error)[:100]})
            continue
        result.append({"config": vars(config), "seconds": seconds})
    return sorted(result, key=lambda r: r.get("seconds", math.inf))


def measure(repeats: int = 50, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Time all sides at Stable Diffusion 1.5's and XL's sizes on the GPU.

    Returns:
        ``gpu``, ``cases``: sides, bytes and FLOPs by model, rows (2-16), rank (0-800), dtype; ``configurations``: every tile size.

    Raises:
        SepMEError: there is no GPU, or the kernels do not run on it.
    """
    if not torch.cuda.is_available():
        raise SepMEError("There is no GPU that PyTorch can use here; 'sepme bench kernel --aot' needs none.")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := ops.why_not((), context=torch.empty(1, device=device)):
        raise SepMEError(f"The kernels do not run on this GPU: {reason}.")
    sizes = [(m, rows, rank) for m in SIZES for rows in (2, 4, 8, 16) for rank in (0, 8, 80, 800)]
    cases, tables = [], []
    for i, (model, rows, rank) in enumerate(sizes):
        on_progress("Timed", i, len(sizes))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            sides = compare(*SIZES[model], rows, rank, "cuda", dtype, repeats)
            cases.append(roofline(model, rows, rank) | {"dtype": str(dtype).removeprefix("torch."), "sides": sides})
        if rank == 8:
            found = configurations(*SIZES[model], rows, rank, torch.float16, repeats)
            tables.append({"model": model, "rows": rows, "rank": rank, "fastest_first": found})
    on_progress("Timed", len(sizes), len(sizes))
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "family": _package(".configs").family(device),
        "versions": {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__},
        "cases": cases,
        "configurations": tables,
    }
