"""Null spaces and concept bases against plain linear algebra in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from planning import (
    angle,
    orthonormal_error,
)
from torch import Tensor

from sepme.errors import SepMEError
from sepme.plan.directions import EXACT_RTOL, PlanOptions, concept_basis, null_basis, null_basis_of_gram, soft_bases


def decaying(rows: int, d_in: int, decay: float, seed: int = 0) -> Tensor:
    """Random rows with singular values ``decay^i``."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, d_in)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d_in, rank, generator=generator, dtype=torch.float64)).Q
    return u * decay ** torch.arange(rank) @ v.T


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


def test_the_null_space_from_a_gram_matrix_is_the_one_from_rows() -> None:
    rows = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 20)
    a, b = null_basis(rows, 0.03), null_basis_of_gram(rows.T @ rows, 0.03)
    assert a.shape == b.shape
    assert angle(a, b) < 1e-8


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


@pytest.mark.parametrize(
    "options",
    [{"mode": "loose"}, {"padding": "some"}, {"tolerance": 0.0}, {"tolerance": 1.0}, {"max_rank": 0}, {"energy": 0.0}, {"energy": 1.5}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(SepMEError):
        PlanOptions(**options)
