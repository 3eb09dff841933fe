"""Which edit erases better: of each layer, or of the context? Both, in closed form and trained by G-CiRs, on the embedded model.

Six concepts of the suite ``demo``, 4 pictures each, the gate on, each of them attacked; a JSON line a method:
``python benchmarks/edits.py FOLDER``. Some twenty processor minutes on one core.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sepme.evaluate.attacks import attacks
from sepme.evaluate.measure import figures
from sepme.evaluate.run import Run
from sepme.evaluate.suite import Suite
from sepme.hosts.diffusers import DiffusersHost

ATTACK = {"concepts": 6, "steps": 40, "tokens": 4, "batch": 4, "learning_rate": 0.02, "rounds": 20}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    host = DiffusersHost.load("demo")
    for key in ("sepme_closed_form", "sepme_gcirs"):
        for edit in ("layers", "context"):
            suite = replace(Suite.load("demo"), images=4, attack=ATTACK, methods=(key,), settings={key: {"edit": edit}})
            run = Run(host, suite, folder / edit)
            made = run.maker.make(key)
            found, _ = figures(run.sampler, made.eraser, True, 1)
            plain = {name: round(value, 3) for name, value in found.items() if isinstance(value, float)}
            attacked = attacks(run.sampler, made.eraser, run.budget, True)
            print(json.dumps({"method": key, "edit": edit, "bytes": made.eraser.bytes} | attacked | plain), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
