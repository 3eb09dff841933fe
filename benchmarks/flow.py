"""Concepts out of a model that text enters once: pictures and figures on the emoji world's flow transformer, as ``sepme eval`` has them.

``python benchmarks/flow.py TRANSFORMER FOLDER``: the folder ``flow`` that ``python -m sepme.demo.emoji`` writes, and where results go.
Closed form and G-CiRs, both as edits of the context; six concepts of the suite ``demo``, 4 pictures each, two of them attacked.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from sepme.demo.emoji.host import FlowHost
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.run import Run
from sepme.evaluate.suite import Suite

METHODS = ("sepme_closed_form_context", "sepme_gcirs_context")


def main(transformer: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    attack = {"concepts": 2, "steps": 40, "tokens": 4, "batch": 8, "learning_rate": 0.02, "rounds": 10}
    suite = replace(Suite.load("demo"), images=4, methods=METHODS, parts=("methods", "scenes"), attack=attack)

    def told(what: str, done: int, total: int) -> None:
        print(f"{what}: {done}/{total}", flush=True)

    Run(FlowHost.load(transformer), suite, folder, classifier=EmbeddedClassifier(), on_progress=told)()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
