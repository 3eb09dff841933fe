"""The guard: a gate on what cross-attention reads, and the map behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from sepme import cli
from sepme.apply.composition import Composition
from sepme.concepts import Concept, ConceptBook
from sepme.convert import reproject
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.verify import verify
from sepme.errors import SepMEError
from sepme.evaluate.erasers import Separable
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import HALVES, ordinary_prompts
from sepme.plan.guard import balanced_ridge, fit_map
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta
from sepme.train import guard as making
from sepme.train.again import made_again
from sepme.train.guard import GuardOptions, make_guard

BOOK = ConceptBook(
    (Concept("star", ("star", "a star"), "a picture"), Concept("striped", ("striped style", "a striped picture"))),
    ("a red picture", "circle", "a circle", "a blue heart"),
)
CONTEXT_EDIT = TrainOptions.for_mode(objective="closed-form", edit="context")
SMALL = GuardOptions(queries=2, readouts=12, rank=8, rounds=1, tokens=2, steps=3, batch=2)
SPARED = ["", "a red picture", "a circle", "a blue heart"]


@pytest.fixture(scope="module")
def planner(demo_host: DiffusersHost) -> Planner:
    return Planner(demo_host, BOOK, PlanOptions(nearby=8), ordinary=ordinary_prompts()[:40])


@pytest.fixture(scope="module")
def plain(planner: Planner) -> dict[str, ConceptDelta]:
    return {c.name: make_delta(planner, c.name, None, CONTEXT_EDIT) for c in BOOK.concepts}


@pytest.fixture(scope="module")
def guarded(planner: Planner, plain: dict[str, ConceptDelta], demo_host: DiffusersHost) -> dict[str, ConceptDelta]:
    return {n: make_guard(planner, d, demo_host, SMALL if n == "star" else replace(SMALL, rounds=0)) for n, d in plain.items()}


def guard_alone(delta: ConceptDelta) -> ConceptDelta:
    """Its own gate never opens."""
    return replace(delta, gate=2.0)


def test_it_opens_for_its_own_prompts_alone(guarded: dict[str, ConceptDelta], planner: Planner, demo_host: DiffusersHost) -> None:
    """What it was fitted on, in every precision, and its figures say so; of other words a few at most."""
    guard = guarded["star"].guard
    assert guard is not None
    beside = planner.prompts.nearby.found.beside["star"].calibration
    for dtype in (torch.float32, *HALVES):
        opens = guard.opens(demo_host.encode(["star", "a star", *beside[:40]]).context.to(dtype).float())
        assert opens.all()
        assert not guard.opens(demo_host.encode([*SPARED, *planner.prompts.nearby.found.prompts]).context.to(dtype).float()).any()
    facts = guarded["star"].info["guard"]
    assert facts["shut_below"] < guard.threshold < facts["open_above"]
    certificate = guarded["star"].certificate
    assert certificate.collateral is not None
    assert certificate.misses is not None
    assert certificate.misses.share < 0.1
    empty = demo_host.encode([""]).context
    assert guard.openness(empty) == 0
    assert guard.openness(demo_host.encode(["a star"]).context) > 1


def test_answers_are_those_of_the_layers(planner: Planner, plain: dict[str, ConceptDelta], demo_host: DiffusersHost) -> None:
    """To stored queries, as attention itself gives them; and the gate is a sum of them, weighed."""
    maker = making._Maker(planner, plain["star"], demo_host, demo_host.attention_layers(), replace(SMALL, rounds=0), lambda: None)
    context = demo_host.encode(["a striped star", ""]).context
    for layer, stored in zip(demo_host.attention_layers().values(), maker.layers, strict=True):
        key, value = (m(context).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for m in (layer.to_k, layer.to_v))
        query = torch.linalg.lstsq(
            layer.to_k.weight.unflatten(0, (layer.heads, -1)).transpose(1, 2), stored.asked.permute(1, 2, 0)
        ).solution
        asked = query.transpose(1, 2)[None].expand(2, -1, -1, -1)
        wanted = torch.nn.functional.scaled_dot_product_attention(asked, key, value, scale=1.0).transpose(1, 2)
        assert torch.allclose(stored.answers(context), wanted, atol=2e-4)
    maker.fit()
    shifted = maker.guard.readout(context) - maker.guard.readout(context[1:])
    assert shifted[0] > 0 == shifted[1]


def test_prompts_that_it_stays_shut_for_keep_their_bits(guarded: dict[str, ConceptDelta], demo_host: DiffusersHost) -> None:
    composition, context = Composition(tuple(guarded.values())), demo_host.encode(SPARED).context
    assert composition.edit_context(context, torch.ones(2)) is context
    mixed = demo_host.encode(["a star", *SPARED]).context
    edited = composition.edit_context(mixed, torch.ones(2))
    assert torch.equal(edited[1:], mixed[1:])
    assert not torch.equal(edited[0], mixed[0])
    assert composition.edit_context(mixed, torch.zeros(2)) is mixed


def test_it_acts_where_the_gate_is_shut(guarded: dict[str, ConceptDelta], demo_host: DiffusersHost) -> None:
    """At its strength, and not where gates are switched off: there a delta is linear."""
    delta, context = guard_alone(guarded["star"]), demo_host.encode(["a star"]).context
    assert delta.guard is not None
    linear = context + (context @ delta.down.T) @ delta.up_factor("context").T
    composition = Composition((delta,))
    whole = composition.edit_context(context, torch.ones(1))
    assert torch.allclose(whole, delta.guard.reduced(linear), atol=1e-5)
    half = context + 0.5 * (linear - context)
    assert torch.allclose(
        composition.edit_context(context, torch.tensor([0.5])), half + 0.5 * (delta.guard.reduced(half) - half), atol=1e-5
    )
    assert torch.allclose(composition.edit_context(context, torch.ones(1), gate=False), linear, atol=1e-5)
    long = context.repeat(1, 2, 1)
    assert torch.allclose(delta.guard.reduced(long), delta.guard.reduced(context).repeat(1, 2, 1), atol=1e-5)


def test_two_in_one_prompt_act_one_after_the_other(guarded: dict[str, ConceptDelta], demo_host: DiffusersHost) -> None:
    context = demo_host.encode(["a striped star"]).context
    edited = Composition(tuple(guarded.values())).edit_context(context, torch.ones(2))
    expected = context
    for delta in guarded.values():
        expected = expected + (context @ delta.down.T) @ delta.up_factor("context").T
    for delta in guarded.values():
        assert delta.guard is not None
        assert delta.guard.opens(context)
        expected = delta.guard.reduced(expected)
    assert torch.allclose(edited, expected, atol=1e-4)


def test_attacks_meet_what_pictures_meet(guarded: dict[str, ConceptDelta], demo_host: DiffusersHost) -> None:
    """The erased denoiser of an attack reads the context that sampling reads, and the attacker's gate is the one that opens."""
    eraser = Separable([guard_alone(guarded["star"])])
    context = demo_host.encode(["a star", "a circle"]).context
    x, t = torch.randn(2, *demo_host.latent_shape, generator=torch.Generator().manual_seed(3)), torch.tensor([500, 500])
    with torch.no_grad():
        wanted = demo_host.predict(x, t, eraser.composition.edit_context(context, torch.ones(1)))
        with eraser.acting(demo_host, ["star"], True):
            met = demo_host.predict(x, t, context)
    assert torch.allclose(met, wanted, atol=1e-5)
    openness = eraser.openness(context.requires_grad_(), "star")
    assert openness[0] > 1 > openness[1]
    assert torch.autograd.grad(openness.sum(), context)[0].abs().sum() > 0


def test_the_file(guarded: dict[str, ConceptDelta], tmp_path: Path) -> None:
    delta = guarded["star"]
    again = ConceptDelta.load(delta.save(tmp_path / "star.safetensors"))
    assert again.guard is not None
    assert delta.guard is not None
    assert again.guard.threshold == delta.guard.threshold
    assert all(torch.equal(v, again.guard.tensors()[k]) for k, v in delta.guard.tensors().items())
    assert again.content_hash() != replace(delta, guard=None).content_hash()


def _without(tensors: dict[str, Tensor]) -> None:
    del tensors["guard.take"]


def _narrow(tensors: dict[str, Tensor]) -> None:
    tensors["guard.values"] = tensors["guard.values"][:-1].clone()


def _half(tensors: dict[str, Tensor]) -> None:
    tensors["guard.empty"] = tensors["guard.empty"].half()


@pytest.mark.parametrize(
    ("damage", "message"), [(_without, "'guard.take' is missing"), (_narrow, "its guard do not fit"), (_half, "not a float32 matrix")]
)
def test_damaged_guards(
    damage: Callable[[dict[str, Tensor]], None], message: str, guarded: dict[str, ConceptDelta], tmp_path: Path
) -> None:
    path = guarded["star"].save(tmp_path / "star.safetensors")
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    damage(tensors)
    save_file(tensors, path, header)
    with pytest.raises(SepMEError, match=message):
        ConceptDelta.load(path)


def test_a_guard_without_a_threshold(guarded: dict[str, ConceptDelta], tmp_path: Path) -> None:
    path = guarded["star"].save(tmp_path / "star.safetensors")
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    for broken in ({}, {"guard_threshold": "NaN"}, {"guard_threshold": '"high"'}):
        save_file(tensors, path, {k: v for k, v in header.items() if k != "guard_threshold"} | broken)
        with pytest.raises(SepMEError, match="metadata is damaged"):
            ConceptDelta.load(path)


def test_names_give_way_as_words() -> None:
    prompts = ["stars", "a star, stars", "starry", "one star-spangled 星"]
    replaced = ["a shape", "a a shape, a shape", "starry", "one a shape-spangled a shape"]
    assert making._replaced(prompts, ("star", "stars", "星"), "a shape") == replaced


def test_ridge_regression_by_inner_products() -> None:
    """As with features centred and a constant of its own, every group weighing what it should however many rows it has."""
    torch.manual_seed(0)
    features = torch.randn(9, 4, dtype=torch.float64)
    alpha = balanced_ridge(features @ features.T, [(2, 1.0, 1.0), (7, 0.0, 3.0)])
    weight = torch.tensor([0.5] * 2 + [3 / 7] * 7, dtype=torch.float64)
    weight /= weight.mean()
    target = torch.tensor([1.0] * 2 + [0.0] * 7, dtype=torch.float64)
    mean = weight / weight.sum()
    x, y = features - mean @ features, target - mean @ target
    penalty = 1e-2 * (weight * x.square().sum(1)).mean()
    w = torch.linalg.solve((x.T * weight) @ x + penalty * torch.eye(4, dtype=torch.float64), (x.T * weight) @ y)
    assert torch.allclose(features.T @ alpha, w)


def test_the_map_finds_a_low_rank_relation() -> None:
    torch.manual_seed(0)
    tokens, relation = torch.randn(200, 10), torch.randn(10, 2) @ torch.randn(2, 10)
    give, take = fit_map({"a": (tokens[:150], tokens[:150] @ relation, 1.0), "b": (tokens[150:], tokens[150:] @ relation, 2.0)}, 2)
    assert (give.shape, take.shape) == ((10, 2), (2, 10))
    assert torch.allclose(give @ take, relation, atol=0.05)


def test_refusals(planner: Planner, plain: dict[str, ConceptDelta], guarded: dict[str, ConceptDelta], demo_host: DiffusersHost) -> None:
    layered = make_delta(planner, "star", demo_host, TrainOptions.for_mode(objective="closed-form"))
    with pytest.raises(SepMEError, match="edit of the context alone; make the delta with --edit context"):
        make_guard(planner, layered, demo_host)
    with pytest.raises(SepMEError, match="this model has none"):
        make_guard(planner, plain["star"], None)
    lone = Planner(demo_host, BOOK, PlanOptions(nearby=0), ordinary=ordinary_prompts()[:4])
    with pytest.raises(SepMEError, match="look for some"):
        make_guard(lone, plain["star"], demo_host)
    with pytest.raises(SepMEError, match="has a guard, fitted on what was known then"):
        reproject(planner, guarded["star"], demo_host.attention_layers())
    with pytest.raises(SepMEError, match="has a guard, so it cannot be made again"):
        made_again(demo_host, demo_host, guarded["star"], ["circle"])
    with pytest.raises(SepMEError, match="rounds"):
        GuardOptions(rounds=-1)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "GuardOptions", partial(GuardOptions, queries=2, readouts=12, rounds=0, batch=2))
    (tmp_path / "book.yaml").write_text(BOOK.dumps(), encoding="utf-8")
    words = ["train", "demo", str(tmp_path / "book.yaml"), "-o", str(tmp_path / "out"), "--objective", "closed-form", "--guard"]
    words += ["--only", "star", "--nearby", "8"]
    refused = CliRunner().invoke(cli.app, words)
    assert "add --edit context" in str(refused.exception)
    made = CliRunner().invoke(cli.app, [*words, "--edit", "context"], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    path = tmp_path / "out" / "star.safetensors"
    shown = CliRunner().invoke(cli.app, ["inspect", str(path)], catch_exceptions=False)
    assert "star: guarded, against 0 attacks of 0 that were tried" in shown.output
    checked = verify(DiffusersHost.load("demo"), [ConceptDelta.load(path)], nearby=8).checks[0]
    assert checked.holds
    assert checked.misses is not None
    assert checked.misses.share < 0.1
