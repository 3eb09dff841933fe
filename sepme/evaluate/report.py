"""The evaluation's report: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt

from ..files import write_atomically
from .methods import OWN
from .plots import data_uri, figure_uri, heat_maps, loss_curves
from .suite import Suite

COLUMNS = (
    ("erased_accuracy", "erased", "↓"), ("erased_accuracy_all_on", "all on", "↓"), ("erased_accuracy_unseen", "unseen prompts", "↓"),
    ("erased_accuracy_weighted", "weighted", "↓"), ("attack_success", "attack", "↓"),
    ("attack_success_gate_aware", "knowing the gate", "↓"), ("attack_text", "attack by words", "↓"),
    ("attack_text_gate_aware", "knowing the gate", "↓"), ("attack_text_named", "words around the name", "↓"),
    ("attack_text_named_gate_aware", "knowing the gate", "↓"), ("resurgence_accuracy", "resurgence", "↓"),
    ("kept_accuracy", "kept", "↑"), ("kept_accuracy_all_others_on", "kept, others on", "↑"), ("cooccurring_accuracy", "co-occurring", "↑"),
    ("neighbour_accuracy", "neighbours", "↑"), ("restored_bit_identical", "restored", "="), ("untouched_bit_identical", "untouched", "="),
    ("kept_fid", "Fréchet", "↓"), ("kept_lpips", "distance", "↓"),
)  # fmt: skip
MAPS = {"leakage": "leakage", "noise": "noise prediction moved by", "image": "distance of pictures", "accuracy": "prompt's concept seen"}
COMPARED = (("erased_accuracy", -1), ("kept_accuracy", 1), ("cooccurring_accuracy", 1), ("attack_success", -1), ("attack_text_named", -1))


def _trade_off(metrics: dict[str, Any]) -> str:
    figure, both = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axes, column, title in zip(
        both, ("kept_accuracy", "cooccurring_accuracy"), ("others' prompts", "the other in one prompt"), strict=True
    ):
        for i, (key, found) in enumerate(metrics["methods"].items()):
            own = key in OWN
            axes.scatter(found["erased_accuracy"], found[column], s=90 if own else 35, marker="*" if own else "os^Dv"[i % 5], label=key)
        axes.set_xlabel("accuracy on erased concepts (left is better)")
        axes.set_ylabel(f"accuracy, {title}")
    both[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure_uri(figure)


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
    return figure_uri(figure)


def _capacity(rows: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(7.5, 3))
    counts = [r["concepts"] for r in rows]
    axes.plot(counts, [r["leakage_linear_worst"] for r in rows], "o-", label="worst leakage, linear")
    axes.plot(counts, [r["kept_energy_median"] for r in rows], "s-", label="median kept energy")
    axes.set_xscale("log")
    axes.set_xlabel("concepts")
    axes.legend(fontsize=7)
    return figure_uri(figure)


def verdict(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against every other method: a row per pair, with (title, ours, theirs, word) of each figure in :data:`COMPARED`.

    A tie is a difference of at most two standard errors of two shares of as many pictures.
    """
    methods, titles, rows = metrics["methods"], {c: t for c, t, _ in COLUMNS}, []
    for own in (k for k in OWN if k in methods):
        for key in (k for k in methods if k not in OWN):
            cells = []
            for column, sign in ((c, s) for c, s in COMPARED if c in methods[own].keys() & methods[key].keys()):
                a, b = methods[own][column], methods[key][column]
                count = metrics["images"] * (metrics["attack_budget"]["concepts"] if column.startswith("attack") else metrics["concepts"])
                error = ((a * (1 - a) + b * (1 - b)) / count) ** 0.5
                word = "tie" if abs(a - b) <= 2 * error else "win" if sign * (a - b) > 0 else "loss"
                cells.append((titles[column], a, b, word))
            rows.append({"own": own, "other": key, "cells": cells})
    return rows


def write_report(out: Path, suite: Suite, metrics: dict[str, Any]) -> None:
    """Write ``report.html`` from the metrics and the sheets in ``images/``."""
    plots: dict[str, str] = {}
    if metrics["methods"]:
        plots["Erased against kept"] = _trade_off(metrics)
    if metrics.get("strengths"):
        plots["Over strength"] = _strengths(metrics["strengths"])
    if any(v for v in metrics.get("losses", {}).get("sepme_gcirs", {}).values()):
        plots["Training"] = loss_curves(metrics["losses"]["sepme_gcirs"])
    if metrics.get("capacity"):
        plots["Capacity"] = _capacity(metrics["capacity"])
    maps = []
    for key, by_gate in metrics.get("interference", {}).items():
        for gate, table in by_gate.items():
            for what in ("leakage", "noise", "image", "accuracy"):
                tables = {kind: t[what] for kind, t in table["kinds"].items() if t[what][0] != [None] * len(table["names"])}
                maps.append(heat_maps(tables, table["names"], f"{key}, gate {'on' if gate == 'True' else 'off'}: {MAPS[what]}"))
    sheets = {}
    for key in ["stock", *(k + end for k in metrics["methods"] for end in ("", "-gate-off"))]:
        path = out / "images" / f"{key}.jpg"
        if path.exists():
            sheets[key.replace("-gate-off", ", gate off")] = data_uri(path.read_bytes(), "jpeg")
    template = jinja2.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"), autoescape=True)
    page = template.render(
        suite=suite, metrics=metrics, columns=COLUMNS, plots=plots, maps=maps, sheets=sheets, verdict=verdict(metrics),
        attack=metrics["attack_budget"],
    )  # fmt: skip
    write_atomically(out / "report.html", page.encode())
