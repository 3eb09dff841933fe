"""The families' tables against ComfyUI's own classes, tiny; what an edit of the context leaves alone, bit for bit.

Classes that this ComfyUI lacks are left out; SEPME_COMFYUI may name a newer one.
"""

from __future__ import annotations

import pytest
import torch
from tiny import comfyui_models
from tiny.checks import LAYERED, check_exact, check_layers, check_lora, check_recognised, check_table
from tiny.probe import Tiny

pytestmark = [pytest.mark.xdist_group("comfyui inside"), pytest.mark.usefixtures("comfy")]
FAMILIES = [pytest.param(name, id=name) for name in comfyui_models.MODELS]


def build(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    try:
        return comfyui_models.build(name, dtype)
    except comfyui_models.MissingError:
        pytest.skip("This ComfyUI is older than the model")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_is_the_model(name: str) -> None:
    tiny = build(name)
    check_table(name, tiny, "path")
    check_recognised(name, tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_context_edit_is_exact(name: str, dtype: torch.dtype) -> None:
    check_exact(build(name, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(LAYERED & set(comfyui_models.MODELS)))
def test_deltas_of_layers_are_exact(name: str, dtype: torch.dtype) -> None:
    check_layers(name, build(name, dtype))


@pytest.mark.parametrize("name", [name for name in comfyui_models.MODELS if name != "hidream"])
def test_the_lora_form_equals_the_edit(name: str) -> None:
    """UNets in float64: in float32 they round by more than that. Rotary embeddings here know no float64.

    HiDream's 48 blocks round by 3e-6 themselves; diffusers' class is compared in float64.
    """
    check_lora(name, build(name, torch.float64 if name in ("sd1", "sdxl") else torch.float32))
