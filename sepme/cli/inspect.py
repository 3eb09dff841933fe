"""``sepme inspect``: what delta files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..delta.concept_delta import ConceptDelta
from .common import finish, show_table
from .options import Files, Json


def inspect(files: Files, as_json: Json = False) -> None:
    """Say what files erase, and how safe they are."""
    data = []
    for path in files:
        delta = ConceptDelta.load(path)
        extra = {
            "prompts": delta.concept.prompts,
            "anchor": delta.concept.anchor,
            "d_in": delta.d_in,
            "projections": len(delta.projections),
        }
        known = [c.name for c in delta.known]
        data.append(summary(delta, path) | extra | {"known": known, "info": {k: v for k, v in delta.info.items() if k != "losses"}})

    def show() -> None:
        show_summaries(data)
        for d in data:
            print(f"{d['concept']}: {d['edits']}")
            print(f"{d['concept']}: prompts {', '.join(map(repr, d['prompts']))}; separable from {', '.join(d['known']) or 'nothing else'}")
            near = d["info"].get("nearby")
            if near:
                alike = ", ".join(near["synonyms"])
                print(f"{d['concept']}: {near['words']} nearby words preserved{f'; taken to mean the same: {alike}' if alike else ''}")
            guard = d["info"].get("guard")
            if guard:
                print(f"{d['concept']}: guarded, against {guard['attacks']} attacks of {2 * guard['options']['rounds']} that were tried")
            if d["pooled"] is not None:
                print(f"{d['concept']}: pooled text vector {d['pooled']['mode']}, residual {d['pooled']['residual']:.3f}")

    finish(data, as_json, show)


def summary(delta: ConceptDelta, path: Path) -> dict[str, Any]:
    """A delta file's figures, one flat dictionary."""
    certificate, objective = delta.certificate, delta.facts.objective
    figures = certificate.to_json()
    keys = ("collateral", "misses", "kept_energy", "gate_low", "gate_high", "gate_overlap", "false_touch_rate", "null_dims", "pooled")
    return {
        "concept": delta.concept.name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "rank": delta.rank,
        "mode": certificate.mode,
        "architecture": delta.architecture,
        "edits": delta.edits,
        "objective": objective.name,
        "steps": objective.steps,
        "gate": delta.gate,
        "content_hash": delta.content_hash(),
        "grade": delta.grade,
        "verdict": delta.verdict,
        "leakage_linear_max": certificate.worst_leakage,
        "leakage_gated_max": certificate.worst_leakage_gated,
        **{k: figures[k] for k in keys},
    }


def show_summaries(rows: list[dict[str, Any]]) -> None:
    """Print summaries as a table."""
    table = Table("concept", "rank", "mode", "kB", "objective", "steps", "leak (linear)", "leak (gated)", "gate", "margin", "file")
    for r in rows:
        margin = f"{r['gate_low']:.3f} < {r['gate']:.3f} < {r['gate_high']:.3f}" if None not in (r["gate_low"], r["gate_high"]) else "?"
        table.add_row(
            r["concept"], str(r["rank"]), r["mode"], f"{r['bytes'] / 1000:.0f}", r["objective"], str(r["steps"]),
            f"{r['leakage_linear_max']:.4f}",
            f"{r['leakage_gated_max']:.4f}", f"{r['gate']:.3f}", margin, r["file"],
        )  # fmt: skip
    show_table(table, 120)
    for r in rows:
        print(f"{r['concept']}: {r['verdict']}")
