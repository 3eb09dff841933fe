"""What takes an erased concept's place: anchors found by themselves, against the empty prompt, on the embedded model.

``python benchmarks/anchors.py`` prints a table: how often the classifier still reads the concept, how often it reads the others and the
background that the prompt names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from sepme.apply.composition import Composition
from sepme.demo.run import demo_suite
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.vocabulary import nearby_words
from sepme.train.erasures import Erasures, Named

SEEDS = range(40, 42)
WAYS: dict[str, tuple[str | None, bool]] = {  # anchor (None: found), whether neighbours are preserved too
    "empty prompt": ("", False),
    "anchor found": (None, False),
    "anchor found, neighbours preserved": (None, True),
}


SUITE = demo_suite()
GROUNDS = {"a red background": "red", "a blue background": "blue"}


def prompts(name: str) -> list[str]:
    return list(SUITE.prompts(name)[1:4])


def share(host: DiffusersHost, classifier: EmbeddedClassifier, cases: list[tuple[str, str]], deltas: Composition | None) -> float:
    """How often the classifier reads the word beside each prompt."""
    texts = [p for p, _ in cases for _ in SEEDS]
    words = [w for _, w in cases for _ in SEEDS]
    seeds = [s for _ in cases for s in SEEDS]
    return classifier.correct(host.generate(texts, seeds, deltas, steps=SUITE.steps), words).float().mean().item()


def main() -> None:
    host, classifier, made = DiffusersHost.load("demo"), EmbeddedClassifier(), Erasures()
    names = SUITE.names
    rows = {}
    for way, (anchor, preserved) in WAYS.items():
        figures: dict[str, list[float]] = {"erased": [], "others": [], "background": []}
        for name in names:
            preserve = nearby_words(host, name, prompts(name), 8) if preserved else []
            delta = Composition(made.get(host, [Named(name, anchor=anchor)], preserve))
            figures["erased"].append(share(host, classifier, [(p, name) for p in prompts(name)], delta))
            others = [(prompts(n)[0], n) for n in names if n != name]
            figures["others"].append(share(host, classifier, others, delta))
            coloured = [(f"{prompts(name)[0]} on {text}", word) for text, word in GROUNDS.items()]
            figures["background"].append(share(host, classifier, coloured, delta))
        every = Composition(made.get(host, [Named(n, anchor=anchor) for n in names]))
        figures["erased, all on"] = [share(host, classifier, [(p, n) for n in names for p in prompts(n)], every)]
        rows[way] = {key: round(sum(v) / len(v), 3) for key, v in figures.items()}
        print(way, rows[way], file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
