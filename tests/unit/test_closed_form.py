"""The closed form against plain least squares in numpy, and what it does to a concept's keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sepme.concepts import Concept, ConceptBook
from sepme.model.layers import weights
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train.objectives.closed_form import shift, solve, up_factors

ROWS, D_IN, RANK = 40, 24, 5


def problem(rows: int = ROWS, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = {"a.to_k": (7, D_IN), "a.to_v": (7, D_IN), "b.to_k": (12, D_IN), "b.to_v": (12, D_IN)}
    matrices = {n: torch.randn(s, generator=generator) for n, s in layers.items()}
    tokens, target = (torch.randn(rows, D_IN, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.linalg.qr(torch.randn(D_IN, RANK, generator=generator, dtype=torch.float64)).Q.T
    return matrices, tokens, target, down


def by_numpy(weight: Tensor, tokens: Tensor, target: Tensor, down: Tensor, mu: float) -> np.ndarray:
    """argmin_Y ‖H Yᵀ − (C* − C) Wᵀ‖² + μ‖Y‖², as an ordinary least-squares problem with √μ I stacked below H."""
    h = tokens.numpy() @ down.numpy().T
    goal = (target - tokens).numpy() @ weight.double().numpy().T
    stacked = np.vstack([h, np.sqrt(mu) * np.eye(h.shape[1])])
    return np.linalg.lstsq(stacked, np.vstack([goal, np.zeros((h.shape[1], goal.shape[1]))]), rcond=None)[0].T


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1, 10.0])
@pytest.mark.parametrize("rows", [RANK, ROWS])
def test_is_ridge_regression(ridge: float, rows: int) -> None:
    """μ is relative to the mean eigenvalue of HᵀH."""
    matrices, tokens, target, down = problem(rows)
    h = (tokens @ down.T).numpy()
    mu = ridge * np.trace(h.T @ h) / RANK
    for name, y in solve(matrices, tokens, target, down, ridge).items():
        expected = by_numpy(matrices[name], tokens, target, down, mu)
        assert y.dtype == torch.float32
        assert y.shape == (matrices[name].shape[0], RANK)
        assert np.abs(y.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_fewer_tokens_than_directions() -> None:
    """HᵀH is singular; the ridge picks (nearly) the least solution, which meets the target on the tokens."""
    matrices, tokens, target, down = problem(RANK - 2)
    for name, y in solve(matrices, tokens, target, down, 1e-9).items():
        h = tokens @ down.T
        goal = (target - tokens) @ matrices[name].double().T
        assert (h @ y.double().T - goal).abs().max() <= 1e-5 * goal.abs().max()
        least = np.linalg.pinv(h.numpy()) @ goal.numpy()
        assert np.abs(y.numpy().T - least).max() <= 1e-5 * np.abs(least).max()


def test_all_directions_reach_the_target() -> None:
    """With D = I and no more tokens than directions, c (W + ΔW)ᵀ is C* Wᵀ."""
    matrices, tokens, target, _ = problem(10)
    for name, y in solve(matrices, tokens, target, torch.eye(D_IN), 1e-10).items():
        w = matrices[name].double()
        assert torch.allclose(tokens @ (w + y.double()).T, target @ w.T, rtol=0, atol=1e-3)


def test_values_only() -> None:
    matrices, tokens, target, down = problem()
    both, values = (solve(matrices, tokens, target, down, values_only=v) for v in (False, True))
    assert list(values) == list(matrices)
    for name in matrices:
        if name.endswith("to_k"):
            assert torch.equal(values[name], torch.zeros(matrices[name].shape[0], RANK))
            assert both[name].abs().max() > 0.1
        else:
            assert torch.equal(values[name], both[name])


def test_nothing_to_do_is_zero() -> None:
    matrices, tokens, _, down = problem()
    assert all(torch.equal(y, torch.zeros_like(y)) for y in solve(matrices, tokens, tokens, down).values())


def test_half_precision_weights() -> None:
    matrices, tokens, target, down = problem()
    halves = {n: w.half() for n, w in matrices.items()}
    rounded = {n: w.float() for n, w in halves.items()}
    for name, y in solve(halves, tokens, target, down).items():
        assert torch.equal(y, solve(rounded, tokens, target, down)[name])


def test_moves_the_concept_and_nothing_known(world: SimpleNamespace) -> None:
    """On the double world: the concept's keys and values come closer to the anchor's, known ones stay within the leakage."""
    encoder, denoiser = world.Encoder(64), world.Denoiser(64)
    book = ConceptBook((Concept("star", ("star", "a star"), "thing"), Concept("moon", ("moon", "a moon"))))
    planner = Planner(encoder, book, PlanOptions(mode="exact"), ["a cat", "a dog"])
    subspace = planner.plan("star")
    tokens, target = planner.prompts.tokens("star")
    matrices = weights(denoiser.attention_layers())
    moon = encoder.encode(["moon", "a moon"]).context.double().flatten(0, 1)
    for name, y in solve(matrices, tokens, target, subspace.down).items():
        w, delta = matrices[name].double(), (y @ subspace.down).double()
        before, after = ((c @ w.T - target @ w.T).norm() for c in (tokens, tokens))
        after = (tokens @ (w + delta).T - target @ w.T).norm()
        assert after < 0.98 * before
        assert (moon @ delta.T).norm() <= 1e-5 * (tokens @ delta.T).norm()


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
