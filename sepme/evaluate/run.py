"""``sepme eval``: every part of a suite once, each result written to disk as soon as it is there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..concepts import ConceptBook, file_name
from ..errors import SepMEError
from ..files import write_atomically
from ..images import grid, jpeg, save_grid
from ..model.layers import kv_fingerprint
from ..model.protocols import Encoding, EvaluationHost, TextEncoder
from ..plan.capacity import capacity
from ..plan.directions import PlanOptions
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from ..train import TrainOptions
from .attacks import Budget, attacks
from .classifiers import Classifier, make_classifier, measures
from .erasers import Eraser, Separable
from .experiments import Arrivals, interference, losses, order_gaps, random_toggles, scene, strength_sweep, subsets
from .measure import Shown, figures, stock_figures
from .methods import KEYS, OWN, MethodMaker
from .report import write_report
from .robustness import resurgence
from .sampler import Sampler
from .suite import Suite


class _Remembering:
    """A text encoder that encodes no list of prompts twice: scenes and arrivals plan over and over against the same ones."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.known = encoder, dict[tuple[str, ...], Encoding]()

    def encode(self, prompts: Sequence[str]) -> Encoding:
        key = tuple(prompts)
        if key not in self.known:
            self.known[key] = self.encoder.encode(prompts)
        return self.known[key]

    def __getattr__(self, name: str) -> Any:
        """Whatever else it has: its words, whether its prompts have any length."""
        return getattr(self.encoder, name)


class Run:
    """One evaluation of a model in a folder; what is there from the same suite and model is not done again.

    Args:
        clip: folder of a CLIP model, for suites that need one.
        keep_images: write all pictures, not only those of the report.
        check: called between steps and pictures; it may raise :class:`~sepme.errors.Interrupted`.
        classifier: instead of the suite's.
    """

    def __init__(
        self,
        host: EvaluationHost,
        suite: Suite,
        out: Path,
        clip: Path | None = None,
        keep_images: bool = False,
        on_progress: OnProgress = silent,
        check: Callable[[], None] = lambda: None,
        classifier: Classifier | None = None,
    ) -> None:
        self.host, self.suite, self.out, self.keep_images = host, suite, out, keep_images
        self.on_progress, self.check = on_progress, check
        try:
            self.plan, self.budget = PlanOptions(**suite.plan), Budget(**suite.attack)
        except TypeError as error:
            raise SepMEError(f"The suite {suite.name}: an unknown entry in plan or attack ({error}).") from None
        self.classifier = classifier or make_classifier(suite, clip, host.device)
        self.encoder = _Remembering(host)
        self.sampler = Sampler(host, self.classifier, suite, check)
        self.maker = MethodMaker(host, suite.book(), self.plan, out / "methods", suite.settings, on_progress, check)
        self.facts = {
            "suite": suite.facts(),
            "kv": kv_fingerprint(host.attention_layers()),
            "judge": [self.classifier.what, measures(self.classifier)],
        }

    def stored(self, name: str, compute: Callable[[], Any], *own: Any) -> Any:
        """A result from disk, or computed and written; ``own``: what it depends on beside what all do."""
        digest = hashlib.sha256(json.dumps([self.facts, own], sort_keys=True).encode()).hexdigest()
        path = self.out / "results" / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.get("digest") == digest:
                return data["result"]
        result = compute()
        write_atomically(path, json.dumps({"digest": digest, "result": result}, indent=1).encode())
        return json.loads(json.dumps(result))

    def __call__(self) -> dict[str, Any]:
        """Do everything and write ``metrics.json``, CSV files and ``report.html``; returns the metrics."""
        parts = self.suite.parts
        metrics: dict[str, Any] = {
            "suite": self.suite.name,
            "judge": self.classifier.what,
            "measures": measures(self.classifier),
            "concepts": len(self.suite.names),
            "images": self.suite.images,
            "steps": self.suite.steps,
            "threads": torch.get_num_threads(),
            "attack_budget": vars(self.budget),
            "stock": self.stored("stock", self._stock),
            "methods": {},
        }
        keys = [k for k in KEYS if k in self.suite.methods]
        if "methods" in parts:
            for i, key in enumerate(keys):
                self.on_progress("Methods", i, len(keys))
                metrics["methods"][key] = self.stored(f"method-{key}", partial(self._method, key), self._settings(key))
            self.on_progress("Methods", len(keys), len(keys))
        experiments: dict[str, Callable[[str], Any]] = {
            "interference": lambda key: {str(g): interference(self.sampler, self._separable(key), g) for g in (True, False)},
            "subsets": lambda key: {str(g): subsets(self.sampler, self._separable(key), g, self.suite.subsets) for g in (True, False)},
            "strengths": lambda key: {str(g): strength_sweep(self.sampler, self._separable(key), g) for g in (True, False)},
            "toggles": lambda key: random_toggles(self.sampler, self._separable(key), self.suite.toggles),
            "scenes": self._scenes,
            "losses": lambda key: losses({d.concept.name: d for d in self._separable(key).composition.deltas}),
            "order": lambda key: order_gaps(
                self.sampler, self._planner, self._options(key), self.suite.names[:: max(1, len(self.suite.names) // 2)]
            ),
        }
        for key in keys:
            wanted = [s for s in experiments if s in (*parts, "losses") and (key in OWN or s == "scenes")]
            if not wanted:
                continue
            for i, name in enumerate(wanted):
                self.on_progress(f"{key}: experiments", i, len(wanted))
                own = (self._settings(key), getattr(self.suite, name, None))
                metrics.setdefault(name, {})[key] = self.stored(f"{name}-{key}", partial(experiments[name], key), *own)
            self.on_progress(f"{key}: experiments", len(wanted), len(wanted))
        for key, gaps in metrics.get("order", {}).items():
            if key in metrics["methods"]:
                metrics["methods"][key]["order_gap"] = max(gaps.values(), default=0.0)
        metrics["order_gap"] = max((max(g.values(), default=0.0) for g in metrics.get("order", {}).values()), default=None)
        if "capacity" in parts:
            metrics["capacity"] = self.stored("capacity", self._capacity, self.suite.counts)
        write_atomically(self.out / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True).encode())
        self._tables(metrics)
        write_report(self.out, self.suite, metrics)
        return metrics

    def _stock(self) -> dict[str, float]:
        result, shown = stock_figures(self.sampler, self._shown)
        self._show("stock", shown)
        return result | attacks(self.sampler, None, self.budget, True)

    def _method(self, key: str) -> dict[str, Any]:
        made = self.maker.make(key)
        result = self._measured(key, made.eraser, True) | {"seconds": made.seconds, "bytes": made.eraser.bytes}
        if made.eraser.gated:
            result["gate_off"] = self._measured(f"{key}-gate-off", made.eraser, False)
        return result

    def _measured(self, label: str, eraser: Eraser, gate: bool) -> dict[str, Any]:
        found, shown = figures(self.sampler, eraser, gate, self._shown)
        self._show(label, shown)
        found |= attacks(self.sampler, eraser, self.budget, gate)
        if self.host.attention_layers():  # which is what a short fine-tune changes
            found["resurgence_accuracy"] = resurgence(self.sampler, eraser, gate, **self.suite.resurgence)
        return found

    @property
    def _shown(self) -> int:
        """Pictures of a batch, held until they are written."""
        return self.suite.images if self.keep_images else 6

    def _show(self, label: str, shown: Shown) -> None:
        """A sheet for the report: a row per concept, two pictures per condition; the last row neighbours. On request all pictures."""
        conditions = [shown[k] for k in ("erased", "both", "restored")]
        rows = [torch.cat([c[i][:2] for c in conditions]) for i in range(len(conditions[0]))]
        rows += [images[:6] for images in shown.get("neighbours", [])]
        write_atomically(self.out / "images" / f"{file_name(label)}.jpg", jpeg(grid(torch.cat(rows), columns=6)))
        for condition, images in shown.items() if self.keep_images else ():
            save_grid(torch.cat(images), self.out / "images" / f"{file_name(label)}-{condition}.png", len(images[0]))

    def _settings(self, key: str) -> dict[str, Any]:
        return dict(self.suite.settings.get(key, {}))

    def _separable(self, key: str) -> Separable:
        eraser = self.maker.make(key).eraser
        assert isinstance(eraser, Separable)
        return eraser

    def _planner(self, book: ConceptBook) -> Planner:
        self.check()
        return Planner(self.encoder, book, self.plan)

    def _options(self, key: str) -> TrainOptions:
        return TrainOptions.for_mode(**self._settings(key) | OWN[key])

    def _scenes(self, key: str) -> dict[str, Any]:
        """Every scene from the start; concepts of this project's methods are made as they come, those of others were made before."""

        def method() -> Callable[[list[str]], Eraser]:
            if key in OWN:
                return Arrivals(self.sampler, self._planner, self._options(key))
            eraser = self.maker.make(key).eraser
            return lambda known: eraser

        kinds, sampler = self.suite.concepts, self.sampler
        return {
            s["name"]: scene(sampler, method(), s["events"], kinds.get(s.get("kind", "")), s.get("pictures")) for s in self.suite.scenes
        }

    def _capacity(self) -> list[dict[str, Any]]:
        return [r.to_json() for r in capacity(self.host, self.suite.book(), self.suite.counts)]

    def _tables(self, metrics: dict[str, Any]) -> None:
        """``methods.csv``: a row per method and gate; ``interference.csv``: a row per pair."""
        rows = []
        for key, found in metrics["methods"].items():
            for gate, values in (("on", found), ("off", found.get("gate_off"))):
                if values is not None:
                    plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
                    rows.append({"method": key, "gate": gate if "gate_off" in found else ""} | plain)
        _csv(self.out / "methods.csv", rows)
        pairs = []
        for key, by_gate in metrics.get("interference", {}).items():
            for gate, table in by_gate.items():
                for kind, matrices in table["kinds"].items():
                    for i, one in enumerate(table["names"]):
                        for j, other in enumerate(table["names"]):
                            values = {k: m[i][j] for k, m in matrices.items()}
                            pairs.append({"method": key, "gate": gate, "prompts": kind, "delta": one, "concept": other} | values)
        _csv(self.out / "interference.csv", pairs)


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())
