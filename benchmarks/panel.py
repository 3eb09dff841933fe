"""Latency of ComfyUI's toggle panel: from the click to the next painted frame, in a real browser, beside an empty page's frame.

Run in a checkout whose environment has the test extra: ``python benchmarks/panel.py [--concepts 200] [--clicks 40]``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")  # instead of this folder, whose comfyui.py is another one

from browser.chromium import FLAGS, chromium  # noqa: E402
from browser.page import Page  # noqa: E402
from comfyui.server import serving  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

# the time until the frame after the action is painted; nothing: what waiting for a frame takes by itself
MEASURE = """async ([id, clicks]) => {
  const rows = id && [...sepmeTest.node(id).sepmePanel.element.querySelectorAll(".sepme-row")];
  const times = [];
  for (let i = 0; i < clicks; i++) {
    await new Promise((done) => setTimeout(done, 50));
    const start = performance.now();
    if (rows) {
      const target = rows[(i * 7) % rows.length].querySelector(".sepme-switch");
      for (const kind of ["mousedown", "mouseup", "click"]) target.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
    }
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - start);
  }
  return times;
}"""


def measure(page: Page, concepts: int, clicks: int) -> dict[str, Any]:
    """Milliseconds from a click on a switch to the next frame, and of a frame without one."""
    book = page.add("SepMEConceptBook", 80, 140, book=json.dumps({"concepts": [f"artist {i}" for i in range(concepts)]}))
    train = page.add("SepMETrain", 420, 140)
    apply = page.add("SepMEApply", 800, 140)
    idle = page.tab.evaluate(MEASURE, [None, clicks])
    page.wire(book, 0, train, "concepts")
    page.wire(train, 0, apply, "deltas")
    page.wait_rows(apply, *(f"artist {i}" for i in range(concepts)))
    times = page.tab.evaluate(MEASURE, [apply, clicks])
    worst = sorted(times)[int(0.95 * len(times))]
    return {"click_ms": statistics.median(times), "click_ms_p95": worst, "frame_ms": statistics.median(idle)}


def main() -> None:
    """Print the figures of both renderers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=200)
    parser.add_argument("--clicks", type=int, default=40)
    parser.add_argument("--out", type=Path, help="a file that the figures are written to")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "base") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for name, vue in (("canvas", False), ("nodes2", True)):
            page = Page(browser, server, vue, "en", (1400, 900))
            page.load()
            page.clear()
            results[name] = measure(page, arguments.concepts, arguments.clicks)
            page.close()
        browser.close()
    load = round(os.getloadavg()[0], 1)  # other jobs on the machine tell in the figures
    text = json.dumps({"concepts": arguments.concepts, "clicks": arguments.clicks, "load": load, **results}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
