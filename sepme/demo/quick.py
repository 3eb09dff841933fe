"""``sepme demo``: concepts of the embedded model erased and given back, on a page that is written as it goes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

import jinja2
import torch
from torch import Tensor

from ..concepts import file_name
from ..delta.concept_delta import ConceptDelta
from ..errors import Interrupted
from ..evaluate.classifiers import EmbeddedClassifier
from ..evaluate.erasers import Separable
from ..evaluate.measure import share
from ..evaluate.plots import data_uri
from ..evaluate.sampler import Sampled, Sampler
from ..files import write_atomically
from ..hosts.diffusers import DiffusersHost
from ..images import grid, png, save_grid
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from ..train import Job, TrainOptions, each, train_book
from .run import MOST, chance, demo_suite

TEMPLATE = Path(__file__).with_name("page.html")
SHORT: dict[str, Any] = {"batch": 2, "trajectories": 2}  # less than usual: somebody waits
COLUMNS = ("stock", "erased", "all erased", "given back", "erased by training")


@dataclass
class PictureRow:
    """What the page shows of one concept: pictures by column, and two concepts in one prompt with and without it, as data URIs."""

    name: str
    prompt: str
    pictures: dict[str, str] = field(default_factory=dict)
    both: tuple[str, str] | None = None


class QuickDemo:
    """One run into a folder.

    Args:
        images: pictures per concept and condition.
        concepts: how many, at most the suite's.
        say: told, in a sentence, what there is to look at.
    """

    def __init__(
        self, host: DiffusersHost, out: Path, images: int, concepts: int, on_progress: OnProgress, say: Callable[[str], None]
    ) -> None:
        self.host, self.out, self.on_progress, self.say = host, out, on_progress, say
        self.suite = demo_suite(concepts, images)
        host.pipe.vae.to(memory_format=torch.channels_last)  # decodes twice as fast on a CPU
        classifier = EmbeddedClassifier()
        self.sampler = Sampler(host, classifier, self.suite, lambda: None)
        self.rows = [PictureRow(n, self.sampler.sets.own(n).prompts[0]) for n in self.suite.names]
        self.found: dict[str, list[Sampled]] = {column: [] for column in (*COLUMNS[1:], "both", "others")}
        facts = {"images_per_condition": images, "denoising_steps": self.suite.steps, "threads": torch.get_num_threads()}
        self.metrics: dict[str, Any] = facts | {"chance_accuracy": chance(self.suite, classifier)}

    def __call__(self) -> dict[str, Any]:
        """Write ``first.png``, ``report.html`` and ``metrics.json``; returns the metrics."""
        started = time.perf_counter()
        planner = Planner(self.host, self.suite.book())
        solved: dict[str, ConceptDelta] = {}
        self.metrics["seconds_closed_form_per_concept"] = self._make(
            planner, self.host, "closed-form", lambda d: solved.update({d.concept.name: d})
        )
        eraser = Separable(list(solved.values()))
        self._first(eraser)
        with self._beside(planner) as trained:
            for i, row in enumerate(self.rows):
                self.on_progress("Erased in closed form", i, len(self.rows))
                self._solved(row, eraser)
                self._write()
            self.on_progress("Erased in closed form", len(self.rows), len(self.rows))
            while not trained.done():
                self.on_progress("Erased by training", len(self.found[COLUMNS[-1]]), len(self.rows))
                wait([trained], timeout=1)
            self.metrics["seconds_train_per_concept"] = trained.result()
        self.on_progress("Erased by training", len(self.rows), len(self.rows))
        self.metrics |= self._figures() | {"seconds_total": time.perf_counter() - started}
        self._write(done=True)
        write_atomically(self.out / "metrics.json", json.dumps(self.metrics, indent=2, sort_keys=True).encode())
        return self.metrics

    def _make(
        self, planner: Planner, host: DiffusersHost, objective: str, use: Callable[[ConceptDelta], object], stopped: Event | None = None
    ) -> float:
        """Make and save the deltas of all concepts, use each as it is ready; seconds per concept."""
        started, names = time.perf_counter(), self.suite.names

        def check(step: Any = None) -> None:
            if stopped is not None and stopped.is_set():
                raise Interrupted

        def save(delta: ConceptDelta) -> None:
            path = self.out / "deltas" / objective.replace("-", "_") / f"{file_name(delta.concept.name)}.safetensors"
            use(ConceptDelta.load(delta.save(path)))

        options = TrainOptions.for_mode(objective=objective, **SHORT)
        train_book(Job(planner, host, options, names, each(names)), save, check, check)
        return (time.perf_counter() - started) / len(names)

    @contextmanager
    def _beside(self, planner: Planner) -> Iterator[Future[float]]:
        """Training in a second thread, on a copy of the model: pictures of the closed form are drawn meanwhile, by half of the cores."""
        sampler, rows, stopped, threads = copy.copy(self.sampler), {r.name: r for r in self.rows}, Event(), torch.get_num_threads()
        sampler.host = host = copy.deepcopy(self.host)

        def show(delta: ConceptDelta) -> None:
            name = delta.concept.name
            self._show(rows[name], COLUMNS[-1], sampler.sample(sampler.sets.own(name), Separable([delta]), [name]))

        torch.set_num_threads(max(1, threads // 2))
        try:
            with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
                try:
                    yield pool.submit(self._make, planner, host, "gcirs", show, stopped)
                finally:
                    stopped.set()
        finally:
            torch.set_num_threads(threads)

    def _first(self, eraser: Separable) -> None:
        """A picture before anything else: stock beside erased."""
        name = self.rows[0].name
        batch = self.sampler.sets.own(name).first(1)
        pair = torch.cat([self.sampler.stock(batch).first(1), self.sampler.sample(batch, eraser, [name]).first(1)])
        path = save_grid(pair, self.out / "first.png", scale=4)
        self.say(f"“{batch.prompts[0]}”, as the model draws it and with “{name}” erased: {path}")
        self._write()
        self.say(f"The page fills while you read it: {self.out / 'report.html'}")

    def _solved(self, row: PictureRow, eraser: Separable) -> None:
        sampler, sets, names = self.sampler, self.sampler.sets, self.suite.names
        own, both = sets.own(row.name), sets.both(row.name)
        row.pictures["stock"] = _uri(sampler.stock(own).first(2))
        rest = [n for n in names if n != row.name]
        for column, erased in (("erased", [row.name]), ("all erased", names), ("given back", rest)):
            self._show(row, column, sampler.sample(own, eraser, erased))
        sampled = sampler.sample(both, eraser, [row.name])
        row.both = (both.prompts[0], _uri(torch.cat([sampler.stock(both).first(1), sampled.first(1)])))
        self.found["both"].append(sampled)
        self.found["others"].append(sampler.sample(sets.others(row.name), eraser, [row.name]))

    def _show(self, row: PictureRow, column: str, sampled: Sampled) -> None:
        row.pictures[column] = _uri(sampled.first(2))
        self.found[column].append(sampled)

    def _figures(self) -> dict[str, float]:
        read = {column: fmean(s.accuracy for s in found) for column, found in self.found.items()}
        sets = self.sampler.sets
        return {
            "stock_accuracy": fmean(self.sampler.stock(sets.own(r.name)).accuracy for r in self.rows),
            "erased_accuracy_single": read["erased"],
            "erased_accuracy_all": read["all erased"],
            "erased_accuracy_trained": read["erased by training"],
            "cooccurring_accuracy": read["both"],
            "restored_bit_identical": share(self.found["given back"]),
            "untouched_bit_identical": share(self.found["others"]),
        }

    def _write(self, done: bool = False) -> None:
        environment = jinja2.Environment(autoescape=True)
        page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        html = page.render(rows=self.rows, columns=COLUMNS, metrics=self.metrics, done=done)
        write_atomically(self.out / "report.html", html.encode())


def _uri(images: Tensor) -> str:
    return data_uri(png(grid(images)))


def run_quick(
    host: DiffusersHost,
    out: Path,
    images: int = 2,
    concepts: int = MOST,
    on_progress: OnProgress = silent,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Erase, erase together and give back each concept; pictures go into ``report.html`` of ``out`` as they come; returns the metrics."""
    return QuickDemo(host, out, images, concepts, on_progress, say)()
