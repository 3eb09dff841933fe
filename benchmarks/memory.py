"""How near the count of a training step's memory is to what a process really takes: ``python benchmarks/memory.py``.

Each line is a process of its own on the embedded model: peak resident memory above what it held before the step, beside the count.
"""

from __future__ import annotations

import subprocess
import sys

from sepme.hosts.diffusers import DiffusersHost
from sepme.hosts.loading import LoadOptions
from sepme.train import TrainOptions, memory

CASES = [(4, 64, "gcirs"), (8, 64, "gcirs"), (16, 64, "gcirs"), (4, 128, "gcirs"), (4, 64, "fmn")]


def resident(field: str) -> int:
    """Bytes that this process holds: ``VmRSS`` now, ``VmHWM`` at its peak."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])


def measure(batch: int, size: int, objective: str) -> str:
    """One step, measured and counted."""
    host = DiffusersHost.load("demo", options=LoadOptions(size=size))
    empty, options = host.encode([""]), TrainOptions.for_mode(objective=objective, batch=batch)
    memory._run(host, empty, TrainOptions.for_mode(trajectories=1))  # what is made once
    before = resident("VmRSS")
    memory._step(host, empty, options)
    peak = resident("VmHWM") - before
    counted = memory.step_bytes(host, empty, options)
    return f"{objective}, batch {batch}, size {size}: measured {peak / 1e6:.1f} MB, counted {counted / 1e6:.1f} MB"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
    else:
        for case in CASES:
            subprocess.run([sys.executable, __file__, *map(str, case)], check=True)
