"""``sepme bench solver``: the null-space solver against the published one, planning at scale, closed form at SD 1.5's size."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept, ConceptBook
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..model.families.unet import diffusers_to_ldm
from ..model.protocols import Encoding
from ..plan.directions import EXACT_RTOL, PlanOptions, null_basis
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from ..train.objectives.closed_form import shift, up_factors
from . import alternate, seconds

TOKENS = 77
SOLVER_SIZES = ((4, 16), (8, 32), (16, 64), (32, 128), (64, 256), (96, 512), (154, 768))  # rows of A, d_in


@dataclass(frozen=True)
class SolverOptions:
    """Sizes of the benchmark.

    Attributes:
        budget: seconds that the published solver may take in all.
        sizes: ``(rows of A, d_in)``, growing.
        pairs: timings per side.
        concepts: planned at each of ``d_ins``.
        closed_form: concepts solved at once.
    """

    budget: float = 60.0
    sizes: tuple[tuple[int, int], ...] = SOLVER_SIZES
    pairs: int = 3
    concepts: int = 1000
    d_ins: tuple[int, ...] = (768, 2048)
    closed_form: int = 100


class RandomEncoder:
    """Seeded token matrices with a text encoder's structure: the same start token everywhere, positions with a mean of their own,
    and a few directions of the prompt's own that all later tokens, padding too, mix; norms as CLIP's last layer has them.
    """

    def __init__(self, d_in: int) -> None:
        generator = torch.Generator().manual_seed(d_in)
        self.mean = torch.randn(TOKENS, d_in, generator=generator) + torch.randn(d_in, generator=generator)
        self.mean[0] *= 3

    def encode(self, prompts: Sequence[str]) -> Encoding:
        rows = torch.stack([self._row(p) for p in prompts])
        return Encoding(rows, torch.arange(TOKENS).expand(len(rows), -1) < 6)

    def _row(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big"))
        own = torch.randn(4, self.mean.shape[1], generator=generator)
        mix = torch.randn(TOKENS, 4, generator=generator) * 0.2 + 0.4
        row = self.mean + mix @ own + 0.2 * torch.randn(self.mean.shape, generator=generator)
        row[0] = self.mean[0]
        return row


class _Remembered:
    """Prompts encoded beforehand, so that planning is timed and not the encoder."""

    def __init__(self, encoder: RandomEncoder, prompts: Sequence[str]) -> None:
        self.known = {p: encoder.encode([p]) for p in prompts}

    def encode(self, prompts: Sequence[str]) -> Encoding:
        parts = [self.known[p] for p in prompts]
        return Encoding(torch.cat([p.context for p in parts]), torch.cat([p.mask for p in parts]))


def sympy_null_basis(rows: Tensor) -> Tensor:
    """What the published code calls: ``sympy.Matrix(A).nullspace()``, columns scaled to unit length."""
    try:
        import sympy
    except ImportError:
        raise SepMEError("This benchmark compares with sympy, which is missing; run: pip install sympy.") from None
    columns = sympy.Matrix(rows.tolist()).nullspace()
    basis = torch.tensor([[float(v) for v in c] for c in columns], dtype=torch.float64).T
    return basis / basis.norm(dim=0)


def quality(rows: Tensor, basis: Tensor) -> dict[str, float]:
    """``‖A Sp‖ / ‖A‖`` and the condition number of Sp (spectral norms)."""
    norm = torch.linalg.matrix_norm
    return {"residual": float(norm(rows @ basis, 2) / norm(rows, 2)), "condition": float(torch.linalg.cond(basis))}


def bench_solver(options: SolverOptions, on_progress: OnProgress = silent) -> list[dict[str, Any]]:
    """Both solvers on growing A; a size that sympy could not finish in the budget is solved by ours alone."""
    results: list[dict[str, Any]] = []
    started, rate = time.perf_counter(), 0.0  # seconds a unit of work (elimination: rows² d_in) that sympy took last
    for i, (rows, d_in) in enumerate(options.sizes):
        on_progress("Solver", i, len(options.sizes))
        matrix = torch.randn(rows, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
        expected = rate * rows**2 * d_in * options.pairs
        result: dict[str, Any] = {"rows": rows, "d_in": d_in}
        if time.perf_counter() - started + expected <= options.budget:
            result |= _both(matrix, options.pairs)
            rate = result["sympy"]["seconds"] / (rows**2 * d_in)
        else:
            took = median(seconds(lambda: null_basis(matrix, EXACT_RTOL)) for _ in range(options.pairs))  # noqa: B023
            result["ours"] = quality(matrix, null_basis(matrix, EXACT_RTOL)) | {"seconds": took}
        results.append(result)
    on_progress("Solver", len(options.sizes), len(options.sizes))
    return results


def _both(matrix: Tensor, pairs: int) -> dict[str, Any]:
    ours, published = null_basis(matrix, EXACT_RTOL), list[Tensor]()
    timing = alternate(lambda: published.append(sympy_null_basis(matrix)), lambda: null_basis(matrix, EXACT_RTOL), pairs)
    return {
        "sympy": quality(matrix, published[0]) | {"seconds": timing.first},
        "ours": quality(matrix, ours) | {"seconds": timing.second},
        "speedup": timing.ratio,
    }


def bench_plan(d_in: int, concepts: int, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Plan that many concepts of one prompt in mode ``auto``, gates on the whole corpus of ordinary prompts included."""
    from ..plan.gate import ordinary_prompts

    names = [f"concept {i}" for i in range(concepts)]
    encoder = _Remembered(RandomEncoder(d_in), ["", *names, *ordinary_prompts()])
    book = ConceptBook(tuple(Concept(n, (n,)) for n in names))
    started = time.perf_counter()
    planner = Planner(encoder, book, PlanOptions(mode="auto"), on_progress=on_progress)
    certificates = [s.certificate for s in planner.plan_all().values()]
    return {
        "seconds": time.perf_counter() - started,
        "mode": planner.mode,
        "leakage_linear_worst": max(c.worst_leakage for c in certificates),
        "kept_energy_min": min(c.kept_energy for c in certificates),
    }


def sd15_shapes() -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` of Stable Diffusion 1.5's 32 K/V weights by projection name."""
    layers = list(diffusers_to_ldm([[1, 1]] * 3 + [[0, 0]], 1, [[0] * 3] + [[1] * 3] * 3).values())
    widths = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320]
    return {f"{n}.{p}": (w, 768) for n, w in zip(layers, widths, strict=True) for p in ("to_k", "to_v")}


def bench_closed_form(concepts: int) -> float:
    """Median seconds of the up-factors of that many concepts, seven prompts each, on SD 1.5-sized weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) for n, s in sd15_shapes().items()}
    target = torch.randn(7 * TOKENS, 768, generator=generator)
    tokens = [torch.randn(7 * TOKENS, 768, generator=generator) for _ in range(concepts)]
    downs = [torch.linalg.qr(torch.randn(768, 8, generator=generator)).Q.T for _ in range(concepts)]
    return median(seconds(lambda: up_factors(weights, [shift(t, target, d) for t, d in zip(tokens, downs, strict=True)])) for _ in range(3))


def delta_bytes() -> int:
    """Size of a rank-8 delta file for SD 1.5, separable from nine other concepts, certificate and recipe in it."""
    concepts = tuple(Concept(f"concept {i}") for i in range(10))
    prompts = ["", *(p for c in concepts for p in c.prompts)]
    planner = Planner(_Remembered(RandomEncoder(768), prompts), ConceptBook(concepts), PlanOptions(mode="soft"), ordinary=())
    subspace = planner.plan(concepts[0].name)
    generator = torch.Generator().manual_seed(0)
    up = {n: torch.randn(s[0], len(subspace.down), generator=generator) for n, s in sd15_shapes().items()}
    info = {
        "known": [{"name": c.name, "prompts": c.prompts} for c in concepts[1:]],
        "certificate": subspace.certificate.to_json(),
        "recipe": {"book": planner.book.dumps(), "plan": asdict(subspace.options)},
    }
    return len(ConceptDelta.from_factors(subspace.concept, subspace.down, up, subspace.gate, info).to_bytes())


def run(options: SolverOptions | None = None, on_progress: OnProgress = silent) -> dict[str, Any]:
    """All of it; the figures of ``--json``."""
    options = options or SolverOptions()
    solver = bench_solver(options, on_progress)
    plans = {str(d): bench_plan(d, options.concepts, on_progress) for d in options.d_ins}
    on_progress("Closed form", 0, 1)
    closed_form = bench_closed_form(options.closed_form)
    on_progress("Closed form", 1, 1)
    return {
        "solver": solver,
        "solver_speedup_vs_sympy": [r["speedup"] for r in solver if "speedup" in r][-1],
        "solver_residual": max(r["ours"]["residual"] for r in solver),
        "plan": plans,
        "plan_1000_seconds": {d: p["seconds"] for d, p in plans.items()},
        "closed_form_100_seconds": closed_form,
        "delta_bytes_sd15_rank8": delta_bytes(),
        "options": asdict(options),
        "threads": torch.get_num_threads(),
    }
