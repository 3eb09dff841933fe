"""The families' tables against diffusers' own classes, tiny; what an edit of the context leaves alone, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny import diffusers_models
from tiny.checks import check_exact, check_lora, check_recognised, check_table

FAMILIES = [pytest.param(name, id=name) for name in diffusers_models.MODELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_is_the_model(name: str) -> None:
    tiny = diffusers_models.build(name)
    check_table(name, tiny, "diffusers")
    check_recognised(name, tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_context_edit_is_exact(name: str, dtype: torch.dtype) -> None:
    check_exact(diffusers_models.build(name, dtype))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lora_form_equals_the_edit(name: str) -> None:
    """In float64, but for classes that keep parts in float32: it is the edits that are compared, not a network's rounding."""
    mixed = name in ("cosmos_predict2", "kandinsky5", "krea2", "wan")
    check_lora(name, diffusers_models.build(name, torch.float32 if mixed else torch.float64))
