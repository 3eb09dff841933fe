"""The evaluation's report: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..files import write_atomically
from .suite import Suite

COLUMNS = (
    ("erased_accuracy", "erased ↓"), ("erased_accuracy_all_on", "erased, all on ↓"), ("erased_accuracy_unseen", "unseen prompts ↓"),
    ("erased_accuracy_weighted", "weighted ↓"), ("kept_accuracy", "kept ↑"), ("kept_accuracy_all_others_on", "kept, others on ↑"),
    ("cooccurring_accuracy", "co-occurring ↑"), ("restored_bit_identical", "restored =" ), ("untouched_bit_identical", "untouched ="),
    ("attack_success", "attack ↓"), ("resurgence_accuracy", "resurgence ↓"), ("kept_fid", "FID kept ↓"), ("kept_lpips", "distance kept ↓"),
)  # fmt: skip


def _figure(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _heat(matrix: list[list[float]], names: list[str], title: str) -> str:
    figure, axes = plt.subplots(figsize=(3.4, 3.1))
    axes.imshow(matrix, cmap="magma_r", vmin=0, vmax=max(1e-9, *(max(r) for r in matrix)))
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, fontsize=8)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color="grey")
    return _figure(figure)


def _trade_off(metrics: dict[str, Any]) -> str:
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    for key, found in metrics["methods"].items():
        own = key.startswith("sepme")
        axes.scatter(found["erased_accuracy"], found["kept_accuracy"], s=60 if own else 25, marker="*" if own else "o")
        axes.annotate(key, (found["erased_accuracy"], found["kept_accuracy"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel("accuracy on erased concepts (left is better)")
    axes.set_ylabel("accuracy on the others meanwhile")
    return _figure(figure)


def _strengths(sweep: dict[str, Any]) -> str:
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    for key, by_gate in sweep.items():
        for gate, rows in by_gate.items():
            style = "-" if gate == "True" else ":"
            x = [r["strength"] for r in rows]
            label = f"{key}{'' if gate == 'True' else ', gate off'}"
            line = axes.plot(x, [r["erased_accuracy"] for r in rows], style, label=f"erased: {label}")[0]
            axes.plot(x, [r["kept_accuracy"] for r in rows], style, color=line.get_color(), alpha=0.4, label=f"kept: {label}")
    axes.set_xlabel("strength")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=6, ncols=2)
    return _figure(figure)


def _losses(curves: dict[str, Any]) -> str:
    figure, axes = plt.subplots(figsize=(7.5, 3))
    for name, values in curves.get("sepme_gcirs", {}).items():
        axes.plot([v / (abs(values[0]) or 1) for v in values], label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("L_cor, first step = 1")
    axes.legend(fontsize=7)
    return _figure(figure)


def _capacity(rows: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(7.5, 3))
    counts = [r["concepts"] for r in rows]
    axes.plot(counts, [r["leakage_linear_worst"] for r in rows], "o-", label="worst leakage, linear")
    axes.plot(counts, [r["kept_energy_median"] for r in rows], "s-", label="median kept energy")
    axes.set_xscale("log")
    axes.set_xlabel("concepts")
    axes.legend(fontsize=7)
    return _figure(figure)


def verdict(metrics: dict[str, Any]) -> list[str]:
    """Wins, ties and losses of ours against every other method, on kept and co-occurring accuracy, in sentences."""
    methods, lines = metrics["methods"], []
    for own in (k for k in ("sepme_gcirs", "sepme_closed_form") if k in methods):
        for key, found in methods.items():
            if key.startswith("sepme"):
                continue
            mine, parts = methods[own], []
            for column, sign, title in (
                ("erased_accuracy", -1, "erased"),
                ("kept_accuracy", 1, "kept"),
                ("cooccurring_accuracy", 1, "co-occurring"),
            ):
                gap = sign * (mine[column] - found[column])
                word = "ties" if abs(gap) < 0.02 else "wins" if gap > 0 else "loses"
                parts.append(f"{word} on {title} ({mine[column]:.2f} against {found[column]:.2f})")
            lines.append(f"{own} against {key}: {', '.join(parts)}.")
    return lines


def write_report(out: Path, suite: Suite, metrics: dict[str, Any]) -> None:
    """Write ``report.html`` from the metrics and the grids in ``images/``."""
    plots: dict[str, str] = {}
    if metrics["methods"]:
        plots["Erased against kept"] = _trade_off(metrics)
    if metrics.get("strengths"):
        plots["Over strength"] = _strengths(metrics["strengths"])
    if any(v for v in metrics.get("losses", {}).get("sepme_gcirs", {}).values()):
        plots["Training"] = _losses(metrics["losses"])
    if metrics.get("capacity"):
        plots["Capacity"] = _capacity(metrics["capacity"])
    maps = []
    for key, by_gate in metrics.get("interference", {}).items():
        for gate, table in by_gate.items():
            label = f"{key}, gate {'on' if gate == 'True' else 'off'}"
            for kind in ("templated", "cooccurring"):
                for what in ("leakage", "noise", "accuracy"):
                    maps.append(_heat(table["kinds"][kind][what], table["names"], f"{label}: {what}, {kind}"))
    grids = {}
    for path in sorted((out / "images").glob("*.png")):
        grids[path.stem] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    template = jinja2.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"), autoescape=True)
    page = template.render(
        suite=suite, metrics=metrics, columns=COLUMNS, plots=plots, maps=maps, grids=grids, verdict=verdict(metrics),
        attack=metrics["attack_budget"],
    )  # fmt: skip
    write_atomically(out / "report.html", page.encode())
