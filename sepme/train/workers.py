"""Training on many machines through Ray: one task per concept, the same bytes as one process makes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..concepts import ConceptBook
from ..errors import Interrupted, SepMEError
from ..files import first_line
from ..plan.directions import PlanOptions
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from .book import Group, Job
from .guard import GuardOptions
from .make import check_layers
from .options import Progress, TrainOptions
from .source import Pictures

if TYPE_CHECKING:
    from ..delta.thumbnail import Draw

RETRIES = 3
STORE = 256 << 20  # bytes of shared memory; finished deltas pass through it
POLL = REPORT = 0.2  # seconds between looks at the workers, and at least between two reports of one


class Report(NamedTuple):
    """A training step as a worker tells of it; ``pid`` is its process."""

    progress: Progress
    pid: int


def no_pictures(host: Any, check: Callable[[], None] = lambda: None) -> dict[str, Pictures]:
    """No pictures of any concept."""
    return {}


def no_drawing(host: Any, check: Callable[[], None] = lambda: None) -> None:
    """Nothing that draws."""


@dataclass(frozen=True)
class Setup:
    """Everything a process needs to make any of a book's deltas. It is pickled, so callables must be importable.

    Attributes:
        load: the host; text encoders alone where the options need no model.
        names: all concepts of the run (:attr:`Job.names`).
        threads: of torch, in every process.
        pictures: from the host, the user's pictures by concept.
        draw: from the host, what draws small pictures (:attr:`Job.draw`).
        guard: see :class:`Job`.
    """

    load: Callable[[], Any]
    book: ConceptBook
    plan: PlanOptions
    options: TrainOptions
    names: tuple[str, ...]
    threads: int
    pictures: Callable[..., Mapping[str, Pictures]] = no_pictures
    draw: Callable[..., Draw | None] = no_drawing
    guard: GuardOptions | None = None

    def job(self, todo: Sequence[Group], on_progress: OnProgress = silent, check: Callable[[], None] = lambda: None) -> Job:
        """Load the host and what is known of it; ``check`` is called meanwhile and may raise Interrupted."""
        host = self.load()
        if self.options.needs_model:
            check_layers(host, self.options)
            if self.options.make_objective().trained:
                getattr(host, "latent_shape", None)  # raises, before prompts are read, where the model cannot be called
        pictures = self.pictures(host, check=check)
        planner = Planner(host, self.book, self.plan, on_progress=on_progress)
        denoiser = host if self.options.needs_model or self.guard is not None else None
        return Job(planner, denoiser, self.options, self.names, todo, pictures, self.draw(host, check=check), self.guard)


class Worker:
    """One process: loads and plans at its first concept, then makes one after the other."""

    def __init__(self) -> None:
        self.job: Job | None = None

    def make(self, setup: Setup, group: Group, report: Callable[[Report], None]) -> bytes:
        """The bytes of a concept's delta file; its checkpoint stays until they are saved (:meth:`forget`)."""
        torch.set_num_threads(setup.threads)
        if self.job is None:
            self.job = setup.job([])
        told = 0.0

        def on_step(step: Progress) -> None:
            nonlocal told
            if time.monotonic() - told >= REPORT:
                told = time.monotonic()
                report(Report(step._replace(predict=None), os.getpid()))  # a model does not travel

        return self.job.make(group, on_step)[0].to_bytes()

    def forget(self, checkpoint: Path) -> None:
        """Remove a checkpoint: its delta is saved."""
        checkpoint.unlink(missing_ok=True)


class Reports:
    """Where workers leave their reports."""

    def __init__(self) -> None:
        self.waiting: list[Report] = []

    def add(self, report: Report) -> None:
        """Leave one."""
        self.waiting.append(report)

    def take(self) -> list[Report]:
        """What was left since the last call."""
        taken, self.waiting = self.waiting, []
        return taken


def train_on_workers(
    setup: Setup,
    todo: Sequence[Group],
    workers: int,
    address: str | None,
    save: Callable[[str, bytes], None],
    on_report: Callable[[Report], None] = lambda report: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make the deltas of several concepts, each by whichever worker is free; a worker that dies is replaced and its concept retried.

    Args:
        todo: concepts, one per group, with a checkpoint each; on another machine a worker keeps it there.
        workers: processes at once.
        address: of a Ray cluster; None: processes on this machine.
        save: takes a concept's name and the bytes of its finished file, in this process; only then its checkpoint goes.
        on_report: called with what workers report.
        check: called about every fifth of a second; it may raise Interrupted.

    Raises:
        SepMEError: Ray is missing or the cluster out of reach; what training raises; a worker died too often.
        Interrupted: raised by ``check``; checkpoints stay.
    """
    try:
        import ray
    except ImportError:
        raise SepMEError("Training with --workers needs Ray; run: pip install 'comfyui-sepme[ray]'.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside any other load hardly anything is trained
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": workers, "object_store_memory": STORE}
    try:
        ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise SepMEError(f"Ray cannot be started or reached ({first_line(error)}); check the address, or leave it out.") from None
    try:
        _distribute(ray, setup, todo, workers, save, on_report, check)
    finally:
        ray.shutdown()


def _distribute(
    ray: Any,
    setup: Setup,
    todo: Sequence[Group],
    workers: int,
    save: Callable[[str, bytes], None],
    on_report: Callable[[Report], None],
    check: Callable[[], None],
) -> None:
    reports = ray.remote(num_cpus=0)(Reports).remote()
    gpus = 1 if str(getattr(setup.load, "keywords", {}).get("device", "")).startswith("cuda") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(Worker)
    free = [remote.remote() for _ in range(min(workers, len(todo)))]
    waiting = list(todo)
    running: dict[Any, tuple[Any, Group]] = {}
    while waiting or running:
        while free and waiting:
            worker, group = free.pop(), waiting.pop(0)
            running[worker.make.remote(setup, group, _Reporter(reports))] = worker, group
        done, _ = ray.wait(list(running), timeout=POLL)
        for report in ray.get(reports.take.remote()):
            on_report(report)
        check()
        for result in done:
            worker, ((name,), checkpoint) = running.pop(result)
            save(name, _get(ray, result, name))
            if checkpoint is not None:
                worker.forget.remote(checkpoint)
                checkpoint.unlink(missing_ok=True)
            free.append(worker)


@dataclass(frozen=True)
class _Reporter:
    reports: Any

    def __call__(self, report: Report) -> None:
        self.reports.add.remote(report)


def _get(ray: Any, result: Any, name: str) -> bytes:
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (SepMEError, Interrupted)):
            raise error.cause from None
        raise
    except ray.exceptions.RayError:
        raise SepMEError(
            f"The worker that made {name!r} died {RETRIES + 1} times, perhaps short of memory; run again with --resume and fewer workers."
        ) from None
