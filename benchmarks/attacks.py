"""Prompts made to bring three concepts of the embedded model back, against several methods.

``python benchmarks/attacks.py FOLDER [METHOD...]``, where METHOD is stock, guard (closed form of the context behind a guard), or a key
of ``sepme eval``. Each figure is of twelve pictures. Before the attacks stands what the method does on its own and other prompts; of guards
also what their gates leave alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sepme.delta.concept_delta import ConceptDelta
from sepme.evaluate.attacks import Attack
from sepme.evaluate.erasers import Eraser, Separable
from sepme.evaluate.measure import figures
from sepme.evaluate.run import Run
from sepme.evaluate.sampler import Sampler
from sepme.evaluate.suite import Suite
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.planner import Planner
from sepme.train import Job, TrainOptions, each, train_book
from sepme.train.guard import GuardOptions
from sepme.train.options import plan_options

METHODS = ("stock", "guard", "sepme_gcirs", "sepme_closed_form", "uce", "esd")
CONCEPTS = {"object": ("rocket", "church"), "style": ("openmoji",)}
NAMES = tuple(name for names in CONCEPTS.values() for name in names)
FINDS = {"soft": Attack.learn, "words": Attack.search, "around the name": Attack.search_around_name}
IMAGES, BUDGET = 12, {"concepts": 1, "steps": 60, "tokens": 4, "batch": 8, "learning_rate": 0.02, "rounds": 20}


def guarded(run: Run, folder: Path) -> Separable:
    """Closed forms of the context behind guards, of the attacked concepts; prints what is known of each, with the processor's seconds."""
    suite, names = run.suite, list(NAMES)
    planner = Planner(run.host, suite.book(), plan_options("subspace", nearby=200))
    options = TrainOptions.for_mode(objective="closed-form", edit="context")
    made: dict[str, ConceptDelta] = {}
    started = time.process_time()

    def save(delta: ConceptDelta) -> None:
        nonlocal started
        made[delta.concept.name], seconds, started = delta, time.process_time() - started, time.process_time()
        path = delta.save(folder / "guard" / f"{delta.concept.name}.safetensors")
        known = {key: value for key, value in delta.certificate.to_json().items() if key in ("collateral", "misses", "false_touch_rate")}
        print(json.dumps({"concept": delta.concept.name, "seconds": round(seconds), "bytes": path.stat().st_size} | known), flush=True)

    train_book(Job(planner, run.host, options, names, each(names), guard=GuardOptions()), save)
    return Separable(list(made.values()))


def attacked(run: Run, eraser: Eraser | None, name: str, find: Callable[[Attack], str], aware: bool) -> tuple[float, str]:
    """Share of pictures that show the concept, and the prompt."""
    found: list[str] = []

    def kept(attack: Attack) -> str:
        found.append(find(attack))
        return found[0]

    return Attack(run.sampler, eraser, name, run.budget, True, aware).success(kept), found[0]


def beside(run: Run, eraser: Eraser) -> dict[str, object]:
    """What the method does on the attacked concepts' prompts and on others."""
    suite = replace(run.suite, concepts=CONCEPTS)
    found, _ = figures(Sampler(run.host, run.classifier, suite, lambda: None), eraser, True, 1)
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def main(folder: Path, methods: tuple[str, ...]) -> None:
    """Print a JSON line per attack."""
    host = DiffusersHost.load("demo")
    for method in methods:
        suite = replace(Suite.load("demo"), images=IMAGES, attack=BUDGET)
        run = Run(host, suite, folder)
        eraser = None if method == "stock" else guarded(run, folder) if method == "guard" else run.maker.make(method).eraser
        if eraser is not None:
            print(json.dumps({"method": method} | beside(run, eraser)), flush=True)
        for name in NAMES:
            for aware in (False, True) if eraser is not None and eraser.gated else (False,):
                for kind, find in FINDS.items():
                    share, prompt = attacked(run, eraser, name, find, aware)
                    row = {
                        "method": method,
                        "concept": name,
                        "attack": kind,
                        "gate_aware": aware,
                        "shown": round(share, 3),
                        "prompt": prompt,
                    }
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or METHODS)
