"""Plots of a report, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def data_uri(data: bytes, kind: str = "png") -> str:
    """Bytes of a picture as something that a page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def figure_uri(figure: Any, dpi: int = 80) -> str:
    """A matplotlib figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return data_uri(buffer.getvalue())


def heat_maps(tables: Mapping[str, Sequence[Sequence[float | None]]], names: Sequence[str], title: str) -> str:
    """Matrices with their numbers side by side, each under its name: delta on (row), prompts of (column); None is left white."""
    width = max(2.9, 0.42 * len(names))
    figure, many = plt.subplots(1, len(tables), figsize=((width + 0.2) * len(tables), width), sharey=True, squeeze=False)
    for axes, (kind, given) in zip(many[0], tables.items(), strict=True):
        matrix = np.array(given, dtype=float)  # None: nan
        top = max(1e-9, np.nanmax(matrix))
        axes.imshow(matrix, cmap="magma_r", vmin=0, vmax=top)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(kind, fontsize=8)
        for (i, j), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                text = "0" if value == 0 else f"{value:.2f}".lstrip("0")
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if value > top / 2 else "black")
    figure.suptitle(title, fontsize=9, y=1.02)
    return figure_uri(figure, dpi=60 if len(tables) > 1 else 90)


def loss_curves(losses: Mapping[str, Sequence[float]]) -> str:
    """The loss of each step by concept, relative to the first."""
    figure, axes = plt.subplots(figsize=(7.5, 3))
    for name, values in losses.items():
        axes.plot([v / (abs(values[0]) or 1) for v in values], label=name, linewidth=1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("L_cor (Eq. 2), first step = 1")
    axes.legend(fontsize=7, ncols=2)
    return figure_uri(figure)
