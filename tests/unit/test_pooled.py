"""The pooled vector's part of a plan: what it replaces, what it leaves alone, and the figures that say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepme.plan.directions import EXACT_RTOL, PlanOptions, null_basis
from sepme.plan.pooled import Pooled, leakage, plan_pooled, residual

D = 32


def vectors(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def test_the_component_along_d_becomes_the_anchors() -> None:
    """``p + (a − p D) Dᵀ`` in float64: the anchor's along D, the prompt's own across it."""
    down = torch.linalg.qr(vectors(3, 0).double().T).Q.T
    pooled, anchor = vectors(5, 1), vectors(1, 2)
    part = Pooled(down.float(), (down @ anchor[0].double()).float())
    replaced = part.replace(pooled).double()
    torch.testing.assert_close(replaced @ down.T, (anchor.double() @ down.T).expand(5, -1), rtol=0, atol=1e-5)
    across = torch.eye(D, dtype=torch.float64) - down.T @ down
    torch.testing.assert_close(replaced @ across, pooled.double() @ across, rtol=0, atol=1e-5)
    assert part.replace(pooled.half()).dtype == torch.float16


def test_a_planned_part_moves_the_concept_and_nothing_known() -> None:
    own, anchor, known = vectors(2, 0), vectors(1, 1), vectors(20, 2).double()
    part, facts = plan_pooled(own, anchor, known, null_basis(known, EXACT_RTOL), PlanOptions(energy=1.0))
    assert part is not None
    torch.testing.assert_close(part.down @ part.down.T, torch.eye(len(part.down)), rtol=0, atol=1e-5)
    torch.testing.assert_close(part.replace(own) - own, part.shift(own), rtol=0, atol=1e-5)
    assert part.shift(own).norm() > 0.1 * own.norm()
    gap = own.double() - anchor.double()
    after = part.replace(own).double() - anchor.double()
    assert facts["residual"] == pytest.approx(float((after.norm(dim=-1) / gap.norm(dim=-1)).max()), rel=1e-4)
    assert facts["residual"] < 1
    assert facts["leakage"] == leakage(part, known) < 1e-5
    assert (facts["mode"], facts["rank"], len(part.down)) == ("replaced", 2, 2)


@pytest.mark.parametrize("null", [None, torch.zeros(D, 0, dtype=torch.float64)], ids=["not asked for", "no room"])
def test_without_directions_the_vector_is_left(null: Tensor | None) -> None:
    part, facts = plan_pooled(vectors(2, 0), vectors(1, 1), vectors(4, 2).double(), null, PlanOptions())
    assert part is None
    assert facts == {"mode": "left", "residual": 1.0}
    assert residual(part, vectors(2, 0), vectors(1, 1)) == 1.0
