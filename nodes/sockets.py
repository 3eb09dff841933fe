"""What runs along the wires between SepME's nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

CATEGORY = "SepME"

Concepts = io.Custom("CONCEPTS")  # a ConceptBook
Deltas = io.Custom("DELTAS")  # a tuple of ConceptDelta
LossMap = io.Custom("LOSS_MAP")  # {"loss": [float, ...]}, as ComfyUI's LossGraphNode plots it


def folded(inputs: list[Any], *names: str) -> list[Any]:
    """Inputs of which newer pages show these only when asked for all; older ones show them like any other."""
    for given in inputs:
        if given.id in names:
            given.extra_dict = {**(given.extra_dict or {}), "advanced": True}
    return inputs


TOGGLES_TIP = (
    'Which concepts are erased, as JSON: {"van gogh": 1.0, "picasso": 0.0}. 1 erases, 0 keeps, values between erase in part. '
    "Concepts not listed are "
)
