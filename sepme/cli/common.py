"""What the commands share: progress bars, interruption, output."""

from __future__ import annotations

import importlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import Interrupted

log = Console(stderr=True, highlight=False, markup=False, emoji=False)  # what users call things is no markup


def register_kernels() -> None:
    """Put the Triton kernels under the operators, where their package is installed; Triton is imported with the first tensor on a GPU."""
    from ..apply import ops

    try:
        importlib.import_module("sepme_kernels").register(ops)
    except ImportError:
        return


def show_table(table: Table, width: int = 0) -> None:
    """Print a table to stdout, at least so wide."""
    Console(markup=False, emoji=False, width=max(Console().width, width)).print(table)


def finish(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print a command's result: as JSON, or as ``show`` prints it."""
    if as_json:
        print(json.dumps(data, indent=2, sort_keys=True))
    else:
        show()


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C and SIGTERM into :class:`Interrupted` at the next check, so that work stops between two steps."""
    stopped = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True

    def check() -> None:
        if stopped:
            raise Interrupted

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def progress_bar() -> Progress:
    """Progress bars on stderr, each with a text of its own beside it (field ``loss``)."""
    what, loss = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[loss]"))
    return Progress(what, BarColumn(), loss, TimeRemainingColumn(), console=log)


def progress(bar: Progress, check: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress callback with one bar for each thing that is going on."""
    tasks: dict[str, Any] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        check()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total, loss="")
        bar.update(tasks[what], completed=done)

    return on_progress
