"""Numbers from outside, and models that give none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sepme.checks import SEEDS, check_number, following_seed
from sepme.concepts import Concept, ConceptBook
from sepme.errors import SepMEError
from sepme.plan.capacity import capacity
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, None, "1", 10**400, -0.1, 1.1])
def test_what_is_no_number_in_range(value: Any) -> None:
    with pytest.raises(SepMEError, match="strength must be a number from 0 to 1, not"):
        check_number("strength", value, 0, 1)


@pytest.mark.parametrize(
    "field", ["steps", "learning_rate", "batch", "threshold", "guidance", "ridge", "regularisation", "seed", "momentum"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 10**400])
def test_training_options(field: str, value: float) -> None:
    with pytest.raises(SepMEError, match=f"{field.replace('_', ' ')} must be a"):
        TrainOptions(**{field: value})


@pytest.mark.parametrize("field", ["tolerance", "epsilon", "max_rank", "energy", "min_kept_energy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1e300])
def test_planning_options(field: str, value: float) -> None:
    with pytest.raises(SepMEError, match=f"{field.replace('_', ' ')} must be a"):
        PlanOptions(**{field: value})


def test_seeds_are_those_of_torch() -> None:
    for seed in SEEDS:
        torch.Generator().manual_seed(seed)
    assert following_seed(SEEDS[1]) == 0
    assert following_seed(SEEDS[1] - 1, 3) == 1
    assert following_seed(-1) == 0


@pytest.mark.parametrize("count", [0, -3])
def test_capacity_of_no_concepts(host: Any, count: int) -> None:
    with pytest.raises(SepMEError, match="count must be a whole number"):
        capacity(host, ConceptBook((Concept("star"),)), [count])


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"steps": 0}, "steps"), ({"steps": -3}, "steps"), ({"steps": 2000}, "steps"), ({"steps": 2.5}, "steps"),
        ({"guidance": math.nan}, "guidance"), ({"guidance": math.inf}, "guidance"),
        ({"seeds": [1 << 64]}, "seed"), ({"seeds": [-(1 << 63) - 1]}, "seed"), ({"seeds": [0.5]}, "seed"),
    ],
)  # fmt: skip
def test_numbers_of_a_picture(host: Any, values: dict[str, Any], what: str) -> None:
    with pytest.raises(SepMEError, match=f"{what} must be a"):
        host.generate(**{"prompts": ["star"], "seeds": [0], "steps": 2} | values)


def broken(host: Any, part: str) -> Any:
    module = getattr(host.pipe, part)
    with torch.no_grad():
        next(module.parameters()).fill_(math.nan)
    return host


@pytest.mark.parametrize(("part", "said"), [("unet", "UNet.*step 1 of 2"), ("vae", "VAE"), ("text_encoder", "text encoder")])
def test_a_model_that_gives_nan_draws_no_picture(make_host: Callable[..., Any], part: str, said: str) -> None:
    host = broken(make_host(), part)
    if part == "vae":
        with torch.no_grad():
            for parameter in host.pipe.vae.decoder.parameters():
                parameter.fill_(math.nan)
    with pytest.raises(SepMEError, match=f"{said}.*float32"):
        host.generate(["star"], [0], steps=2)


def test_a_model_that_gives_nan_is_not_trained_on(make_host: Callable[..., Any]) -> None:
    host = make_host()
    planner = Planner(host, ConceptBook((Concept("star", ("star",)),)), PlanOptions(), ("a cat", "a dog"))
    broken(host, "unet")
    with pytest.raises(SepMEError, match=r"UNet gives NaN.*timestep"):
        make_delta(planner, "star", host, TrainOptions(steps=1))
    with torch.no_grad():
        next(iter(host.attention_layers().values())).to_v.weight[0, 0] = math.inf
    with pytest.raises(SepMEError, match=r"UNet gives NaN.*the weight of .*to_v"):
        make_delta(planner, "star", host, TrainOptions(objective="closed-form"))
