"""The demo's report: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..delta.concept_delta import ConceptDelta
from ..files import write_atomically
from ..images import grid, png

TEMPLATE = Path(__file__).with_name("report.html")
ROWS = (
    ("stock_accuracy", "Stock: read correctly", ""),
    ("erased_accuracy_single", "Erased, alone on", "chance: 0.17"),
    ("erased_accuracy_all", "Erased, all on", "chance: 0.17"),
    ("kept_accuracy_drop_one_on", "Other concepts' drop, one on", "≤ 0.01"),
    ("kept_accuracy_drop_eleven_on", "Own drop, all others on", "≤ 0.01"),
    ("cooccurring_drop", "Co-occurring concept's drop", "as it is"),
    ("restored_bit_identical", "Restored: pictures equal bit for bit", "1"),
    ("untouched_bit_identical", "Untouched: pictures equal bit for bit", "≥ 0.99"),
    ("restored_bit_identical_bf16", "Restored, bfloat16 latents", "1"),
    ("untouched_bit_identical_bf16", "Untouched, bfloat16 latents", "≥ 0.99"),
    ("leakage_linear_max", "Leakage of the linear delta, worst", ""),
    ("leakage_gated_max", "Leakage behind the gate, worst", "0"),
)


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _plot(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return _data_uri(buffer.getvalue())


def heat_map(matrix: Tensor, names: Sequence[str], title: str) -> str:
    """A matrix with its numbers as a PNG data URI."""
    figure, axes = plt.subplots(figsize=(6.2, 5.4))
    axes.imshow(matrix.clamp(0, 1), cmap="magma_r", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("prompts of")
    axes.set_ylabel("delta on")
    axes.set_title(title, fontsize=10)
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            text = "0" if value == 0 else f"{value:.2f}".lstrip("0")
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if value > 0.5 else "black")
    return _plot(figure)


def loss_curves(deltas: dict[str, ConceptDelta]) -> str:
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for name, delta in deltas.items():
        losses = torch.tensor(delta.facts.losses)
        axes.plot(losses / losses[0].abs().clamp_min(1e-9), label=name, linewidth=1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("correlation (Eq. 2), first step = 1")
    axes.legend(fontsize=7, ncols=2)
    return _plot(figure)


def gallery(images: Sequence[Tensor], per_row: int, scale: int = 1) -> str:
    """Sets of pictures ``(n, 3, h, w)`` one above the other, ``per_row`` of each."""
    return _data_uri(png(grid(torch.cat([i[:per_row] for i in images]), per_row), scale))


def write_report(
    path: Path,
    metrics: dict[str, Any],
    names: Sequence[str],
    stock: dict[str, Any],
    shows: dict[str, dict[str, Tensor]],
    matrices: dict[str, Tensor],
    deltas: dict[str, dict[str, ConceptDelta]],
) -> None:
    """Render the report. ``shows[key][condition]`` is ``(concepts, images, 3, h, w)``."""
    columns = 3
    strips = []
    for i, name in enumerate(names):
        sets = [
            ("stock", stock["own"][name].images),
            ("erased (G-CiRs)", shows["gcirs"]["alone"][i]),
            ("all erased", shows["gcirs"]["all"][i]),
            ("given back, others erased", shows["gcirs"]["restored"][i]),
            ("erased (closed form)", shows["closed_form"]["alone"][i]),
        ]
        strips.append({"name": name, "sets": [(title, gallery([images], columns)) for title, images in sets]})
    both = []
    for i, name in enumerate(names):
        reference = stock["both"][name]
        prompts = [p.prompt for p in reference.pictures[:6]]
        both.append({"name": name, "prompts": prompts, "image": gallery([reference.images, shows["gcirs"]["both"][i]], 6)})
    tables = [("G-CiRs", metrics), ("closed form", metrics["closed_form"])]
    environment = jinja2.Environment(autoescape=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metrics=metrics,
        rows=ROWS,
        tables=tables,
        strips=strips,
        both=both,
        names=names,
        matrices=[
            heat_map(matrices["gcirs"], names, "G-CiRs, gate on"),
            heat_map(matrices["gcirs_gate_off"], names, "G-CiRs, gate off"),
            heat_map(matrices["closed_form"], names, "closed form, gate on"),
            heat_map(matrices["closed_form_gate_off"], names, "closed form, gate off"),
        ],
        losses=loss_curves(deltas["gcirs"]),
        deltas=[
            {"name": n, "rank": d.rank, "gate": d.gate, "certificate": d.certificate.to_json(), "hash": d.content_hash()[:12]}
            for n, d in deltas["gcirs"].items()
        ],
    )
    write_atomically(path, html.encode())
    rows: list[Tensor] = []
    for i, name in enumerate(names):
        rows += [stock["own"][name].images[:1], shows["gcirs"]["alone"][i][:1], shows["gcirs"]["restored"][i][:1]]
    picture = torch.stack([torch.cat(rows[k::3]) for k in range(3)]).flatten(0, 1)
    write_atomically(path.with_name("picture.png"), png(grid(picture, len(names), gap=4)))
