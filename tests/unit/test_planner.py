"""Subspaces and refusals of a whole book: on the double encoder, on hashed prompts, and on a real language model."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from planning import (
    D_IN,
    NAMES,
    OPTIONS,
    ORDINARY,
    HashedEncoder,
    MiniLM,
    angle,
    book_of,
    numbered_book,
    orthonormal_error,
    planner_of,
    stacked,
)
from torch import Tensor

from sepme.concepts import Concept, ConceptBook
from sepme.errors import SepMEError
from sepme.plan.directions import EXACT_RTOL, PlanOptions, concept_basis, null_basis
from sepme.plan.gate import ratios
from sepme.plan.planner import Planner, Subspace


def constraints(encoder: Any, book: ConceptBook, name: str) -> Tensor:
    """A_i, stacked here by hand."""
    prompts = ["", *book.preserve, *(p for c in book.concepts if c.name != name for p in c.prompts)]
    return stacked(encoder, prompts)


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
        energy = float((tokens @ down.T).square().sum() / tokens.square().sum())
        assert subspace.certificate.kept_energy == pytest.approx(energy, rel=1e-5)
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


def test_planned_soft_directions_match_a_dense_reference() -> None:
    p = planner_of(40, "soft")
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
    forward = Planner(HashedEncoder(), numbered_book(12), PlanOptions(mode=mode, tolerance=0.3), ordinary=())  # type: ignore[arg-type]
    backward = Planner(HashedEncoder(), ConceptBook(numbered_book(12).concepts[::-1]), forward.options, ordinary=())
    for name, one in forward.plan_all().items():
        other = backward.plan(name)
        assert angle(one.down.T, other.down.T) < 1e-6
        assert one.gate == pytest.approx(other.gate, rel=1e-4)


def test_soft_against_less_is_refused_in_a_sentence() -> None:
    p = Planner(HashedEncoder(), numbered_book(40), PlanOptions(mode="soft", min_kept_energy=0.99), ordinary=())
    with pytest.raises(SepMEError, match=r"No room is left for 'name 0'.*in mode soft.*epsilon"):
        p.plan("name 0")


def test_auto_goes_from_exact_over_tolerance_to_soft() -> None:
    def mode(count: int) -> str:
        p = Planner(HashedEncoder(), numbered_book(count), PlanOptions(mode="auto", tolerance=0.1), ordinary=())
        plans = p.plan_all()
        assert {s.certificate.mode for s in plans.values()} == {p.mode}
        return p.mode

    assert [mode(n) for n in (4, 14, 80)] == ["exact", "tolerance", "soft"]


def test_auto_takes_soft_where_finding_out_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepme.plan.finder.AUTO_WORK", 1.0)
    assert planner_of(4, "auto").mode == "soft"


@pytest.mark.parametrize("count", [2, 6])
def test_soft_leaves_out_directions_that_are_mostly_of_others(world: SimpleNamespace, count: int) -> None:
    concepts = tuple(Concept(n, (n, f"a {n}")) for n in world.words[:count])
    certificate = Planner(world.Encoder(d_in=192), ConceptBook(concepts), PlanOptions(mode="soft")).plan("star").certificate
    assert max(certificate.leakage_linear.values()) < certificate.gate_low < certificate.gate_high


# --- a real language model

ARTISTS = (
    "Vincent van Gogh", "Pablo Picasso", "Claude Monet", "Rembrandt", "Salvador Dali", "Andy Warhol", "Frida Kahlo", "Paul Cezanne",
    "Jackson Pollock", "Caravaggio", "Keith Haring", "Kelly McKernan", "Tyler Edlin", "Kilian Eng", "Edvard Munch", "Gustav Klimt",
    "Henri Matisse", "Johannes Vermeer", "Katsushika Hokusai", "Georgia O'Keeffe", "Banksy", "Rene Magritte", "Edward Hopper",
    "Wassily Kandinsky", "Piet Mondrian", "Marc Chagall", "Joan Miro", "Egon Schiele", "Greg Rutkowski", "Thomas Kinkade",
)  # fmt: skip
FIVE = ("{}", "a painting by {}", "in the style of {}", "artwork of {}", "a portrait, {} style")


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
