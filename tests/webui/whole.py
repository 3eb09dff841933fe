"""A whole WebUI as a new user meets it, from the installation on: HTTP and a browser, on a CPU, with a random checkpoint. By hand:

``SEPME_WEBUI=/path/to/checkout python tests/webui/whole.py [folder]``: the checkout's environment is its ``venv``; the folder (of 5 GB, in
the system's place for temporary files by default) is kept. Training takes most of the time: it reads 640 prompts. What is
installed is HEAD of this repository. Prints a table; exit status 1 where something did not hold.
"""

# ruff: noqa: E402 (what is imported depends on paths set here)
from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from browser.chromium import launched
from webui.conftest import CHECKOUTS
from webui.live import files
from webui.live.page import Page
from webui.live.server import Pictures, Server, pixels, started

BOOK = json.dumps({"concepts": ["van gogh", {"name": "golf ball", "anchor": "a ball"}], "preserve": ["a company logo"]})
BOTH, OTHER = "a golf ball in the style of van gogh", "a company logo"
ON = (True, ["van gogh"], "", True, "auto")
OFF = (False, [], "", True, "auto")
HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 2, "denoising_strength": 0.7}
HIRES["hr_additional_modules"] = ["Use same choices"]  # Forge's API has no default for it
REFINER = {"refiner_checkpoint": "b", "refiner_switch_at": 0.5, "steps": 4}
# requests that are drawn before the extension is there: stock
STOCK: dict[str, dict[str, Any]] = {
    "txt2img": {"prompt": BOTH},
    "without a concept": {"prompt": OTHER},
    "negative prompt": {"prompt": OTHER, "negative_prompt": "van gogh"},
    "hires": {"prompt": BOTH, **HIRES},
    "hires without a concept": {"prompt": OTHER, **HIRES},
    "refiner": {"prompt": BOTH, **REFINER},
    "refiner without a concept": {"prompt": OTHER, **REFINER},
    "img2img": {"prompt": BOTH, "path": "img2img"},
    "prompt matrix": {"prompt": f"{BOTH}|night|rain", "script_name": "prompt matrix", "batch_size": 4},
    "AND": {"prompt": f"a golf ball AND {BOTH}"},
    "prompt editing": {"prompt": "a golf ball in the style of [monet:van gogh:0.5]", "steps": 4},  # two steps would be Monet's alone
    "LoRA": {"prompt": f"{BOTH} <lora:small:1>"},
    "LoRA without a concept": {"prompt": f"{OTHER} <lora:small:1>"},
}
MATRIX = [False, True, "positive", "comma", 0]  # put at the start, the same seed everywhere


class Trial:
    """One host's table."""

    def __init__(self, server: Server, page: Page, folder: Path) -> None:
        self.server, self.page, self.folder = server, page, folder
        self.stock: dict[str, Pictures] = {}
        self.rows: list[tuple[str, str, float]] = []

    def check(self, name: str, run: Callable[[], str | None]) -> None:
        """A row of the table; what fails goes on below it."""
        begin = time.monotonic()
        try:
            said = run() or "yes"
        except Exception as error:
            traceback.print_exc()
            said = f"NO: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.page.leave()
        self.rows.append((name, said, time.monotonic() - begin))
        print(f"{name}: {said} ({self.rows[-1][2]:.0f} s)", flush=True)

    def draw(self, case: str, *panel: Any, **more: Any) -> Pictures:
        request = dict(STOCK[case]) | more
        if request.get("path") == "img2img":
            request["init_images"] = [self.stock["txt2img"].dumps()[1]]
        if "hr_upscaler" in request and not self.server.get("/sdapi/v1/latent-upscale-modes"):
            request["hr_upscaler"] = "None"  # this Neo enlarges pictures only
        if request.get("script_name") == "prompt matrix":
            request["script_args"] = MATRIX
        return self.server.draw(request.pop("prompt"), *panel, **request)

    def draw_stock(self, cases: Iterable[str], known: Path) -> None:
        """Before the extension is there; or what an earlier run with this host drew."""
        if known.exists():
            self.stock = {case: Pictures.loads(texts) for case, texts in json.loads(known.read_text(encoding="utf-8")).items()}
        self.server.load("a")  # Neo begins with any
        for case in [case for case in cases if case not in self.stock]:
            self.stock[case] = self.draw(case)
            known.write_text(json.dumps({case: pictures.dumps() for case, pictures in self.stock.items()}), encoding="utf-8")
        assert self.draw("txt2img") == self.stock["txt2img"], f"the host does not repeat itself, or is another than that of {known}"

    def same(self, case: str, *panel: Any, **more: Any) -> None:
        assert self.draw(case, *panel, **more) == self.stock[case], f"{case}: other than stock"

    def other(self, case: str, *panel: Any, **more: Any) -> Pictures:
        pictures = self.draw(case, *panel, **more)
        assert pictures != self.stock[case], f"{case}: as stock"
        assert "nothing is erased" not in pictures.infotext, pictures.infotext
        return pictures


def install(trial: Trial, repository: str) -> str:
    trial.page.open()
    said = trial.page.install(repository)
    assert "Installed into" in said, said
    trial.server.stop()
    trial.server.start()
    trial.page.open()
    trial.page.tab.wait_for_selector("#script_txt2img_sepme_concepts_enabled", state="attached")
    assert "SepME" in trial.page.text_of("#tabs > .tab-nav button")
    return "installed from its address, shown after a restart"


def train(trial: Trial) -> str:
    trial.page.open()
    stopped = trial.page.train(json.dumps({"concepts": [f"thing {i}" for i in range(40)]}), interrupt=True)
    assert "Stopped" in stopped, stopped
    said = trial.page.train(BOOK)
    assert "van gogh" in said, said
    assert "golf-ball.safetensors" in said, said
    context = trial.page.train(BOOK, edit="context", prefix="context/")
    assert "van gogh" in context, context
    return "progress, interrupt, layers and context in closed form"


def switches(trial: Trial) -> None:
    trial.same("txt2img", *OFF)
    on = trial.other("txt2img", *ON)
    trial.same("without a concept", *ON)
    trial.same("txt2img", *OFF)
    assert trial.draw("txt2img", *ON) == on
    trial.other("without a concept", True, ["van gogh"], "", False, "auto")  # without the gate
    trial.same("txt2img", True, ["van gogh"], '{"van gogh": 0}', True, "auto")


def batch_of_tags(trial: Trial) -> None:
    """Four prompts of one batch, of which two have a tag each and one both."""
    trial.same("prompt matrix", *OFF)
    prompt = f"{BOTH}|night <erase:van gogh>|rain <erase:golf ball>"
    arrays, stock = trial.draw("prompt matrix", prompt=prompt).arrays, trial.stock["prompt matrix"].arrays
    assert len(arrays) == len(stock)
    cells = [(a == b).all() for a, b in zip(arrays[-4:], stock[-4:], strict=True)]
    assert cells == [True, False, False, False], cells


def negative(trial: Trial) -> None:
    trial.same("negative prompt", *OFF)
    trial.other("negative prompt", negative_prompt="van gogh<erase:van gogh>")
    trial.other("negative prompt", *ON)


def off_and_on(*cases: str, panel: tuple[Any, ...] = ON) -> Callable[[Trial], None]:
    """Each case off, on, and off again; the last may have none of the concepts, then on changes nothing."""

    def run(trial: Trial) -> None:
        for case in cases:
            (trial.same if "without a concept" in case else trial.other)(case, *panel)
            trial.same(case, *OFF)

    return run


CONTEXT = (True, ["context/van-gogh.safetensors"], "", True, "auto")


def axes(trial: Trial) -> str:
    """The axes of the X/Y/Z plot, by the place that the host gives them."""
    scripts = trial.server.get("/sdapi/v1/script-info")
    plot = next(s for s in scripts if s["name"] == "x/y/z plot" and not s["is_img2img"])
    labels = next(a["choices"] for a in plot["args"] if a["label"] == "X type")
    labels = [label[0] if isinstance(label, list) else label for label in labels]
    none, x, y = (labels.index(n) for n in ("Nothing", "SepME strength", "SepME concepts"))
    arguments = [a["value"] for a in plot["args"]]
    arguments[:9] = [x, "0, 1", [], y, "", ["none", "van gogh", "golf ball"], none, "", []]
    named = {a["label"]: i for i, a in enumerate(plot["args"])}
    for label, value in (("Include Sub Images", True), ("Include Sub Grids", False), ("Draw legend", False)):
        arguments[named[label]] = value
    pictures = trial.server.draw(BOTH, script_name="x/y/z plot", script_args=arguments)
    stock = trial.stock["txt2img"].arrays[0]
    same = [(cell == stock).all() for cell in pictures.arrays if cell.shape == stock.shape]  # the grid is larger
    assert len(same) == 6, [a.shape for a in pictures.arrays]
    assert sum(same) == 4, same  # strength 0 three times, and no concept at strength 1
    return "cells of strength 0 and of no concept are stock"


def infotext(trial: Trial) -> str:
    """A picture's text and its file put the panel back; the page's own button then makes that picture."""
    on = trial.other("txt2img", True, ["van gogh"], '{"van gogh": 0.5}', True, "auto")
    dropped = trial.folder / "dropped.png"
    dropped.write_bytes(on.files[0])
    for put in (lambda: trial.page.paste(on.infotext), lambda: trial.page.drop(dropped)):
        trial.page.open()
        assert not trial.page.rows
        put()
        assert (trial.page.opened, trial.page.rows) == (True, [("van gogh", 0.5)]), (trial.page.opened, trial.page.rows)
    assert (pixels(trial.page.generate()) == on.arrays[0]).all(), "the page draws another picture than the API"
    return "pasted and dropped; the page draws the API's picture"


def second_checkpoint(trial: Trial) -> str:
    before = trial.draw("txt2img", *ON)
    trial.server.load("b")
    other = trial.draw("txt2img", *ON)
    assert other != before
    assert other != trial.draw("txt2img", *OFF)
    trial.server.load("a")
    assert trial.draw("txt2img", *ON) == before
    trial.same("txt2img", *OFF)
    return other.infotext.partition("SepME note: ")[2][:120] or "yes"


def quiet(trial: Trial) -> str:
    """No traceback that names us, no error of ours on the page."""
    extensions = str(trial.server.data / "extensions")  # nobody else's are there
    ours = [file for file in re.findall('File "([^"]+)"', trial.server.log) if file.startswith(extensions)]
    assert not ours, ours
    assert not trial.page.errors, trial.page.errors
    return f"no traceback of ours, {trial.server.log.count('Traceback (most recent')} of others"


def given_deltas(trial: Trial, source: Path) -> str:
    shutil.copytree(source, trial.server.data / "models" / "sepme")
    return "deltas of another host"


class Row(NamedTuple):
    """A row of the table: what is tried, and which stock pictures it needs beside the first."""

    name: str
    test: Callable[[Trial], str | None]
    cases: tuple[str, ...] = ()


def drawn(name: str, *cases: str, panel: tuple[Any, ...] = ON) -> Row:
    """A row of :func:`off_and_on`."""
    return Row(name, off_and_on(*cases, panel=panel), cases)


ROWS = (
    Row("panel on, off, strength 0, gate", switches, ("without a concept",)),
    Row("two prompts of different tags in one batch (prompt matrix)", batch_of_tags, ("prompt matrix",)),
    Row("negative prompts and their tags", negative, ("negative prompt",)),
    drawn("hires", "hires", "hires without a concept"),
    drawn("img2img", "img2img"),
    drawn("AND", "AND"),
    drawn("prompt editing", "prompt editing"),
    drawn("LoRA beside", "LoRA", "LoRA without a concept"),
    drawn("refiner", "refiner", "refiner without a concept"),
    drawn("context edit", "txt2img", "without a concept", panel=CONTEXT),
    drawn("context edit, hires", "hires", "hires without a concept", panel=CONTEXT),
    drawn("context edit, refiner", "refiner", "refiner without a concept", panel=CONTEXT),
    Row("X/Y/Z plot", axes),
    Row("second checkpoint between", second_checkpoint),
    Row("infotext pasted, PNG dropped", infotext),
    Row("log and page", quiet),
)


def run(checkout: Path, folder: Path, deltas: Path | None, rows: Sequence[Row]) -> bool:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    models, known = folder / "models", folder / f"stock-{checkout.name}-{commit}.json"
    files.relative(models / "b.safetensors", files.checkpoint(models / "a.safetensors", 0), 1)
    files.lora(folder / "lora" / "small.safetensors", 2)
    data = folder / f"data-{checkout.name}"
    shutil.rmtree(data, ignore_errors=True)
    with started(checkout, data, models, folder / "lora") as server, launched() as browser:
        trial = Trial(server, Page(browser, server), folder)
        cases = {"txt2img": None, **{case: None for row in rows for case in row.cases}}
        trial.check("stock pictures", lambda: trial.draw_stock(cases, known))
        trial.check("installed", lambda: install(trial, f"file://{ROOT}"))
        trial.check("training", lambda: train(trial) if deltas is None else given_deltas(trial, deltas))
        for row in rows:
            trial.check(row.name, lambda row=row: row.test(trial))  # type: ignore[misc]
    width = max(len(name) for name, _, _ in trial.rows)
    print(f"\n{checkout.name} {commit}")
    for name, said, seconds in trial.rows:
        print(f"| {name:{width}} | {said} | {seconds:.0f} s |")
    return not any(said.startswith("NO") for _, said, _ in trial.rows)


def main() -> None:
    if not CHECKOUTS:
        sys.exit("SEPME_WEBUI names no checkout")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "sepme-whole")
    parser.add_argument("--deltas", type=Path, help="a folder that another host's run has made, in place of training")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names begin so, in place of all")
    given = parser.parse_args()
    rows = [row for row in ROWS if row.name.startswith(tuple(given.only))]
    held = [run(checkout, given.folder, given.deltas, rows) for checkout in CHECKOUTS]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
