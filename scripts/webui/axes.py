"""Axes of the X/Y/Z plot: "SepME strength" and "SepME concepts"."""

from __future__ import annotations

from typing import Any

from . import host
from .shelf import labels

JOINT = "+"  # commas separate an axis's values


def _strength(p: Any, value: float, values: list[float]) -> None:
    p.sepme_strength = value


def _concepts(p: Any, value: str, values: list[str]) -> None:
    chosen = [name.strip() for name in value.split(JOINT)]
    p.sepme_concepts = [] if chosen == ["none"] else [name for name in chosen if name]


def add_axes() -> None:
    """Add the axes to the host's plot script, once; it may have been left out or renamed."""
    for module in host.script_modules():
        axes = getattr(module, "axis_options", None)
        option = getattr(module, "AxisOption", None)
        if option is None or not isinstance(axes, list) or any(a.label == "SepME strength" for a in axes):
            continue
        axes.append(option("SepME strength", float, _strength))
        axes.append(option("SepME concepts", str, _concepts, choices=lambda: ["none", *labels(host.library.entries())]))
