"""The demo's report: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from ..delta.concept_delta import ConceptDelta
from ..evaluate.plots import data_uri, heat_maps, loss_curves
from ..files import write_atomically
from ..images import grid, png

TEMPLATE = Path(__file__).with_name("report.html")
ROWS = (
    ("stock_accuracy", "Stock: read correctly", ""),
    ("erased_accuracy_single", "Erased, alone on", "≤ chance + 0.05"),
    ("erased_accuracy_all", "Erased, all on", "≤ chance + 0.05"),
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


def gallery(images: Sequence[Tensor], per_row: int, scale: int = 1) -> str:
    """Sets of pictures ``(n, 3, h, w)`` one above the other, ``per_row`` of each."""
    return data_uri(png(grid(torch.cat([i[:per_row] for i in images]), per_row), scale))


def write_report(
    path: Path,
    metrics: dict[str, Any],
    names: Sequence[str],
    stock: Mapping[str, Mapping[str, Tensor]],
    prompts: Mapping[str, Sequence[str]],
    shows: Mapping[str, Mapping[str, Sequence[Tensor]]],
    matrices: Mapping[str, Sequence[Sequence[float]]],
    deltas: Mapping[str, Mapping[str, ConceptDelta]],
) -> None:
    """Render the report.

    Args:
        stock: pictures ``(n, 3, h, w)`` by condition (``own``, ``both``) and concept.
        prompts: of ``both``.
        shows: the same by method and condition, one tensor per concept.
        matrices: noise moved, by title.
    """
    columns = 3
    strips, both = [], []
    for i, name in enumerate(names):
        sets = [
            ("stock", stock["own"][name]),
            ("erased (G-CiRs)", shows["gcirs"]["alone"][i]),
            ("all erased", shows["gcirs"]["everything"][i]),
            ("given back, others erased", shows["gcirs"]["restored"][i]),
            ("erased (closed form)", shows["closed_form"]["alone"][i]),
        ]
        strips.append({"name": name, "sets": [(title, gallery([images], columns)) for title, images in sets]})
        pair = gallery([stock["both"][name], shows["gcirs"]["both"][i]], 6)
        both.append({"name": name, "prompts": list(prompts[name][:6]), "image": pair})
    environment = jinja2.Environment(autoescape=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metrics=metrics,
        rows=ROWS,
        tables=[("G-CiRs", metrics), ("closed form", metrics["closed_form"])],
        strips=strips,
        both=both,
        names=names,
        matrices=[heat_maps({title: matrix}, names, "") for title, matrix in matrices.items()],
        losses=loss_curves({n: d.facts.losses for n, d in deltas["gcirs"].items()}),
        deltas=[
            {"name": n, "rank": d.rank, "gate": d.gate, "certificate": d.certificate.to_json(), "hash": d.content_hash()[:12]}
            for n, d in deltas["gcirs"].items()
        ],
    )
    write_atomically(path, html.encode())
    rows = [[stock["own"][name][0], shows["gcirs"]["alone"][i][0], shows["gcirs"]["restored"][i][0]] for i, name in enumerate(names)]
    picture = torch.stack([row[k] for k in range(3) for row in rows])
    write_atomically(path.with_name("picture.png"), png(grid(picture, len(names), gap=4)))
