"""What a large library costs a real ComfyUI: its start, ``/object_info`` and the list of deltas, with none and with many delta files.

Run in a checkout whose environment has the test extra, on a quiet machine: ``python benchmarks/library.py [--deltas 1000]``. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "tests")  # instead of this folder, whose comfyui.py is another one

import psutil  # noqa: E402
import torch  # noqa: E402
from comfyui.server import Server, serving  # noqa: E402

from sepme.concepts import Concept  # noqa: E402
from sepme.delta.concept_delta import ConceptDelta  # noqa: E402

WIDTH, RANK = 768, 4  # of SD 1.x's context, as edits of the context have it
ROUNDS = 7


def fill(folder: Path, count: int) -> None:
    """Random deltas of the context, in subfolders of a hundred."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        down = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q.T
        up = {"context": torch.randn(WIDTH, RANK, generator=generator)}
        delta = ConceptDelta.from_factors(Concept(f"concept {i}"), down, up, 0.5, {})
        path = folder / f"{i // 100:03}" / f"concept_{i}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        delta.save(path)


def measure(server: Server, began: float) -> dict[str, Any]:
    """Milliseconds; of requests the first one, and the median of the next; also of the server's processor alone (in steps of 10 ms)."""
    process = psutil.Process(server.process.pid)

    def spent() -> float:
        times = process.cpu_times()
        return 1000 * (times.user + times.system)

    found: dict[str, Any] = {"answers_after_ms": 1000 * (time.perf_counter() - began), "answers_after_processor_ms": spent()}
    imported = re.search(r"([\d.]+) seconds: .*comfyui-sepme", server.log.read_text(errors="replace"))
    found["our_import_ms"] = 1000 * float(imported[1]) if imported else None
    for path in ("/object_info", "/object_info/SepMELoadDelta", "/sepme/deltas"):
        times, processor = [], [spent()]
        for _ in range(1 + ROUNDS):
            start = time.perf_counter()
            server.get(path)
            times.append(1000 * (time.perf_counter() - start))
            processor.append(spent())
        found[path] = {"first_ms": times[0], "then_ms": statistics.median(times[1:])}
        found[path] |= {"first_processor_ms": processor[1] - processor[0], "then_processor_ms": (processor[-1] - processor[1]) / ROUNDS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deltas", type=int, default=1000)
    given = parser.parse_args()
    results = {}
    for count in (0, given.deltas):
        with tempfile.TemporaryDirectory() as base:
            fill(Path(base) / "server" / "models" / "sepme", count)
            began = time.perf_counter()
            with serving(Path(base) / "server") as server:
                results[count] = measure(server, began)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
