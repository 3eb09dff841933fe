"""Soft and auto planning, streamed preserve files, the capacity report and the solver benchmark, on a small seeded encoder."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from typer.testing import CliRunner

from sepme import cli
from sepme.bench import alternate
from sepme.bench.solver import SolverOptions, run, sd15_shapes
from sepme.concepts import Concept, ConceptBook
from sepme.errors import SepMEError
from sepme.model.protocols import Encoding
from sepme.plan import capacity as capacity_module
from sepme.plan.capacity import capacity, extended, read_concepts, shipped_names
from sepme.plan.directions import PlanOptions, null_basis, null_basis_of_gram, soft_bases
from sepme.plan.gate import ratios, side_by_side, statistics
from sepme.plan.planner import Planner
from sepme.plan.preserved import PreserveFile
from sepme.plan.tokens import CHUNK
from sepme.train.objectives.closed_form import shift, solve, up_factors

D_IN, TOKENS = 48, 5


class Encoder:
    """Tokens that depend on the prompt and its position alone; now and then counts the rows that anyone still holds."""

    def __init__(self) -> None:
        self.mean = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1))
        self.calls = self.peak = 0

    def encode(self, prompts: Sequence[str]) -> Encoding:
        seeds = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:6], "big") for p in prompts]
        rows = torch.stack([torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(s)) for s in seeds]) + self.mean
        rows[:, 0] = self.mean[0]
        self.calls += 1
        if self.calls % 20 == 0:
            tensors = (o for o in gc.get_objects() if type(o) is Tensor and o.ndim == 3 and o.shape[2] == D_IN)
            self.peak = max(self.peak, sum(len(o) for o in tensors))
        return Encoding(rows, torch.ones(len(prompts), TOKENS, dtype=torch.bool))


def book(count: int, **more: object) -> ConceptBook:
    return ConceptBook(tuple(Concept(f"name {i}", (f"name {i}",)) for i in range(count)), **more)  # type: ignore[arg-type]


def planner(count: int, mode: str, **more: object) -> Planner:
    return Planner(Encoder(), book(count, **more), PlanOptions(mode=mode), ordinary=("a cat", "a dog", "fog", "rain"))  # type: ignore[arg-type]


def angle(a: Tensor, b: Tensor) -> float:
    """Largest difference of the projectors onto two column spaces."""
    return float((a @ a.T - b @ b.T).abs().max())


@pytest.mark.parametrize("against", ["total", "rest"])
def test_soft_directions_are_generalised_eigenvectors(against: str) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(7, 20, dtype=torch.float64, generator=generator)
    rest = torch.randn(60, 20, dtype=torch.float64, generator=generator)
    epsilon = 0.4
    b = (rest.T @ rest + (own.T @ own if against == "total" else 0)).numpy() + epsilon * np.eye(20)
    _, vectors = scipy.linalg.eigh((own.T @ own).numpy(), b)
    expected = np.linalg.qr(vectors[:, ::-1][:, :3])[0]
    factor = torch.linalg.cholesky(rest.T @ rest + own.T @ own + epsilon * torch.eye(20, dtype=torch.float64))
    other = torch.randn(30, 20, dtype=torch.float64, generator=generator)
    found = soft_bases(factor, [other, own], max_rank=3, energy=1.0)[1]  # together with another concept of more rows than d_in
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert angle(found, torch.from_numpy(expected.copy())) < 1e-10


def test_planned_soft_directions_match_a_dense_reference() -> None:
    p = planner(40, "soft")
    rows = {n: e.context.double().reshape(-1, D_IN).numpy() for n, e in p.prompts.encodings.items()}
    everything = np.concatenate([p.prompts.empty.context.double().reshape(-1, D_IN).numpy(), *rows.values()])
    epsilon = p.options.epsilon * (everything**2).sum() / len(everything)
    own = rows["name 3"]
    _, vectors = scipy.linalg.eigh(own.T @ own, everything.T @ everything + epsilon * np.eye(D_IN))
    down = p.plan("name 3").down.double()
    expected = np.linalg.qr(vectors[:, ::-1][:, : len(down)])[0]
    assert angle(down.T, torch.from_numpy(expected.copy())) < 1e-6  # down is float32


@pytest.mark.parametrize("mode", ["tolerance", "soft"])
def test_the_order_of_concepts_does_not_matter(mode: str) -> None:
    forward = Planner(Encoder(), book(12), PlanOptions(mode=mode, tolerance=0.3), ordinary=())  # type: ignore[arg-type]
    backward = Planner(Encoder(), ConceptBook(book(12).concepts[::-1]), forward.options, ordinary=())
    for name, one in forward.plan_all().items():
        other = backward.plan(name)
        assert angle(one.down.T, other.down.T) < 1e-6
        assert one.gate == pytest.approx(other.gate, rel=1e-4)


def test_the_null_space_from_a_gram_matrix_is_the_one_from_rows() -> None:
    rows = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 20)
    a, b = null_basis(rows, 0.03), null_basis_of_gram(rows.T @ rows, 0.03)
    assert a.shape == b.shape
    assert angle(a, b) < 1e-8


def test_soft_against_less_is_refused_in_a_sentence() -> None:
    p = Planner(Encoder(), book(40), PlanOptions(mode="soft", min_kept_energy=0.99), ordinary=())
    with pytest.raises(SepMEError, match=r"No room is left for 'name 0'.*in mode soft.*epsilon"):
        p.plan("name 0")


def write_prompts(path: Path, count: int) -> list[str]:
    prompts = [f"kept {i}" for i in range(count)]
    path.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    return prompts


@pytest.mark.parametrize("mode", ["exact", "tolerance", "soft"])
def test_a_streamed_list_plans_as_one_in_memory(tmp_path: Path, mode: str) -> None:
    prompts = write_prompts(tmp_path / "kept.txt", 4 if mode == "exact" else CHUNK + 44)
    streamed = planner(3, mode, preserve_file=str(tmp_path / "kept.txt"))
    listed = planner(3, mode, preserve=tuple(prompts))
    torch.testing.assert_close(streamed._finder._fixed.gram, listed._finder._fixed.gram, rtol=1e-12, atol=1e-9)
    assert (streamed.prompts.preserved.count, streamed.prompts.preserved.digest) == (
        listed.prompts.preserved.count,
        listed.prompts.preserved.digest,
    )
    if mode == "tolerance":  # 300 prompts leave nothing below 0.03
        with pytest.raises(SepMEError, match="not even one concept fits"):
            streamed.plan("name 0")
        return
    a, b = streamed.plan("name 0"), listed.plan("name 0")
    assert angle(a.down.T, b.down.T) < 1e-6
    leaks = [s.certificate.leakage_linear["(preserved prompts)"] for s in (a, b)]
    assert leaks[0] == pytest.approx(leaks[1], abs=1e-5)
    assert leaks[0] > 0.05 if mode == "soft" else leaks[0] < 2e-3  # what rounding to bfloat16 leaves
    assert float(ratios(listed.prompts.preserved.listed.context, a.down).max()) <= a.gate  # type: ignore[union-attr]


def test_a_long_preserve_file_is_never_held_as_a_whole(tmp_path: Path) -> None:
    write_prompts(tmp_path / "kept.txt", 20_000)
    encoder, seen = Encoder(), list[tuple[str, int, int]]()
    p = Planner(
        encoder, book(2, preserve_file=str(tmp_path / "kept.txt")), PlanOptions(mode="auto"), (), lambda *a: seen.append(a)
    )  # fmt: skip
    p.plan_all()
    assert p.prompts.preserved.count == 20_000
    assert p.mode == "soft"
    assert CHUNK <= encoder.peak <= 6 * CHUNK
    size = (tmp_path / "kept.txt").stat().st_size
    assert ("Preserve file: reading", size, size) in seen
    assert ("Preserve file: gates", size, size) in seen


def test_a_bad_preserve_file_is_a_sentence(tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / "kept.txt").write_bytes(content)
        list(PreserveFile(tmp_path / "kept.txt").batches())

    with pytest.raises(SepMEError, match="cannot be read"):
        PreserveFile(tmp_path / "missing.txt")
    with pytest.raises(SepMEError, match="folder"):
        PreserveFile(tmp_path)
    with pytest.raises(SepMEError, match="is empty"):
        read(b"\n  \n")
    with pytest.raises(SepMEError, match="not a text file"):
        read(b"a cat\n\x89PNG\xff\n")
    with pytest.raises(SepMEError, match="not a text file"):
        read(b"a\0b\n")
    with pytest.raises(SepMEError, match="more than 2000 characters"):
        read(b"x" * 100_000)


def test_a_preserved_prompt_cannot_be_a_concepts(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("fog\nName  1\n", encoding="utf-8")
    with pytest.raises(SepMEError, match=r"'name 1' of concept 'name 1' reads the same .* 'Name  1'"):
        planner(2, "soft", preserve_file=str(tmp_path / "kept.txt"))


def test_a_book_finds_its_preserve_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "book.yaml").write_text("concepts: [a, b]\npreserve_file: kept.txt\n", encoding="utf-8")
    loaded = ConceptBook.load(tmp_path / "book.yaml")
    assert loaded.preserve_file == str(tmp_path / "kept.txt")
    assert ConceptBook.loads(loaded.dumps()) == loaded


def test_auto_goes_from_exact_over_tolerance_to_soft() -> None:
    def mode(count: int) -> str:
        p = Planner(Encoder(), book(count), PlanOptions(mode="auto", tolerance=0.1), ordinary=())
        plans = p.plan_all()
        assert {s.certificate.mode for s in plans.values()} == {p.mode}
        return p.mode

    assert [mode(n) for n in (4, 14, 80)] == ["exact", "tolerance", "soft"]


def test_auto_takes_soft_where_finding_out_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepme.plan.finder.AUTO_WORK", 1.0)
    assert planner(4, "auto").mode == "soft"


def test_statistics_of_many_deltas_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(6, TOKENS, D_IN, generator=generator)
    downs = [torch.linalg.qr(torch.randn(D_IN, k, generator=generator)).Q.T for k in (1, 3, 2)]
    reference = torch.stack([((context @ d.T).norm(dim=-1) / context.norm(dim=-1)).amax(dim=1) for d in downs], dim=1)
    torch.testing.assert_close(statistics(context, side_by_side(downs)), reference, rtol=1e-5, atol=1e-6)


def test_closed_form_of_many_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"a.{p}": torch.randn(9, D_IN, generator=generator) for p in ("to_k", "to_v")}
    parts = [(torch.randn(10, D_IN, generator=generator), torch.linalg.qr(torch.randn(D_IN, k, generator=generator)).Q.T) for k in (2, 3)]
    target = torch.zeros(10, D_IN)
    many = up_factors(weights, [shift(c, target, d) for c, d in parts], values_only=True)
    for (c, d), one in zip(parts, many, strict=True):
        for name, y in solve(weights, c, target, d, values_only=True).items():
            torch.testing.assert_close(one[name], y, rtol=1e-4, atol=1e-5)
        assert not one["a.to_k"].any()


def test_shipped_names_are_a_thousand_and_none_is_part_of_another() -> None:
    names = shipped_names()
    assert len(names) == len({n.casefold() for n in names}) >= 1000
    words = {n: f" {n.casefold()} " for n in names}
    assert not [(a, b) for a in names for b in names if a != b and words[a] in words[b]]
    with pytest.raises(SepMEError, match="names for"):
        extended(book(3), 2000)


def test_capacity_rows() -> None:
    rows = capacity(Encoder(), book(3), (3, 12))
    assert [r.concepts for r in rows] == [3, 12]
    assert rows[0].mode == "exact"
    assert rows[0].leakage_linear_worst < 2e-3  # what rounding to bfloat16 leaves
    assert rows[0].gate_open == 1
    for r in rows:
        assert r.leakage_linear_worst >= r.leakage_linear_median >= r.leakage_gated_median >= 0
        assert 0 < r.kept_energy_min <= r.kept_energy_median <= 1


def test_capacity_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.yaml").write_text("[star, circle]", encoding="utf-8")
    monkeypatch.setattr(cli.verify, "load_host", lambda *_: Encoder())
    arguments = ["verify", "demo", str(tmp_path / "book.yaml"), "--capacity", "--count", "2", "--count", "9"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["given"] == 2
    assert [r["concepts"] for r in data["capacity"]] == [2, 9]
    assert set(data["capacity"][0]) == set(capacity_module.CapacityRow.__dataclass_fields__)
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    with pytest.raises(SepMEError, match="either one book or delta files"):
        read_concepts([tmp_path / "book.yaml", tmp_path / "x.safetensors"])


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


@pytest.mark.parametrize("count", [2, 6])
def test_soft_leaves_out_directions_that_are_mostly_of_others(world: SimpleNamespace, count: int) -> None:
    concepts = tuple(Concept(n, (n, f"a {n}")) for n in world.words[:count])
    certificate = Planner(world.Encoder(d_in=192), ConceptBook(concepts), PlanOptions(mode="soft")).plan("star").certificate
    assert max(certificate.leakage_linear.values()) < certificate.gate_low < certificate.gate_high
