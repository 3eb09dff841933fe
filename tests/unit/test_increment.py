"""An increment on the context is the increments ``w_l = W_l S`` of all layers, on the embedded model in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sepme.concepts import Concept, ConceptBook
from sepme.hosts.diffusers import DiffusersHost
from sepme.model.families import CONTEXT
from sepme.model.layers import weights
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions
from sepme.train.increment import Increment, context_site
from sepme.train.make import make_run
from sepme.train.objectives import OBJECTIVES, Step
from sepme.train.objectives.closed_form import ClosedForm, shift
from sepme.train.passes import make_step
from sepme.train.run import ConceptRun
from sepme.train.source import Draw

ORDINARY = ("a red church", "a picture on a table", "green", "high quality")
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}", f"a {n} picture")) for n in ("star", "openmoji")), ("a red church",))


class World(NamedTuple):
    host: DiffusersHost
    planner: Planner
    kv: dict[str, Tensor]
    run: ConceptRun
    draw: Draw
    other: Increment

    def step(self, *increments: Increment) -> Step:
        return make_step(self.run, increments, self.host, self.draw)


@pytest.fixture(scope="module")
def world() -> World:
    host = DiffusersHost.load("demo", torch.float64)
    planner = Planner(host, BOOK, PlanOptions(max_rank=4), ORDINARY)
    planner.plan_all()
    kv = weights(host.attention_layers())
    options = TrainOptions.for_mode(objective="fmn", trajectories=1)  # which reads words
    run = make_run(planner, "star", host, Increment.zeros(kv, planner.plan("star").down, 1.0), options, None, None)
    draw = run.source.draw(run.generator, 2)
    other = Increment.zeros(kv, planner.plan("openmoji").down, 1.0)
    other.fill(solved(planner, kv, "openmoji"))
    return World(host, planner, kv, run, draw, other)


def solved(planner: Planner, sites: dict[str, Tensor], name: str = "star") -> dict[str, Tensor]:
    """The closed form at some sites."""
    return ClosedForm(TrainOptions()).solve(sites, *planner.prompts.tokens(name), planner.plan(name).down)


def both(world: World, beta: float = 1.0) -> tuple[Increment, Increment]:
    """The closed form in every layer, and on the context."""
    down, context = world.planner.plan("star").down, context_site(384, torch.float64)
    made = Increment.zeros(world.kv, down, beta), Increment.zeros(context, down, beta)
    for increment, sites in zip(made, (world.kv, context), strict=True):
        increment.fill(solved(world.planner, sites))
    return made


def test_the_closed_form_of_the_context_is_s(world: World) -> None:
    tokens, target = world.planner.prompts.tokens("star")
    s = shift(tokens, target, world.planner.plan("star").down)
    _, edit = both(world, beta=0.5)
    torch.testing.assert_close(edit.w[CONTEXT].detach(), 2 * s, rtol=0, atol=0)
    torch.testing.assert_close(edit.up[CONTEXT], s, rtol=0, atol=0)
    assert sum(w.numel() for w in edit.w.values()) == s.numel()


@pytest.mark.parametrize("with_another", [False, True])
def test_the_same_prediction_to_rounding(with_another: bool, world: World) -> None:
    """Alone, and beside another concept's increment in the layers."""
    layers, edit = both(world, beta=0.5)
    more = [world.other] if with_another else []
    with torch.no_grad():
        stock = world.step().erased(world.step().own)
        expected, found = (world.step(i, *more).erased(world.step().own) for i in (layers, edit))
    assert float((expected - stock).norm() / stock.norm()) > 1e-2
    assert float((found - expected).norm() / (expected - stock).norm()) < 1e-9


@pytest.mark.parametrize("objective", [n for n, o in OBJECTIVES.items() if o.trained])
def test_the_gradient_is_the_chain_rule(objective: str, world: World) -> None:
    """``∂L/∂S = Σ_l W_lᵀ ∂L/∂w_l`` at ``w_l = W_l S``, for every loss."""
    layers, edit = both(world)
    loss: Callable[[Step], Tensor] = TrainOptions.for_mode(objective=objective).make_objective().loss
    names = list(layers.w)
    left, right = loss(world.step(layers)), loss(world.step(edit))
    torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-11)
    by_layer = torch.autograd.grad(left, [layers.w[n] for n in names], allow_unused=True, materialize_grads=True)
    (found,) = torch.autograd.grad(right, [edit.w[CONTEXT]])
    expected = sum((world.kv[n].T @ g for n, g in zip(names, by_layer, strict=True)), torch.zeros_like(found))
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-9
