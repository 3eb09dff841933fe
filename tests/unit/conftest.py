"""The double encoder, and a plan on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from planning import NAMES, OPTIONS, ORDINARY, book_of

from sepme.plan.planner import Planner, Subspace


@pytest.fixture(scope="module")
def encoder(world: SimpleNamespace) -> Any:
    return world.Encoder()


@pytest.fixture(scope="module")
def planned(encoder: Any) -> dict[str, Subspace]:
    """Three concepts and a preserved prompt, tolerance mode."""
    planner = Planner(encoder, book_of(3, ["our logo"]), OPTIONS, ORDINARY)
    return {n: planner.plan(n) for n in NAMES[:3]}
