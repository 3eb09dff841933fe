"""What the commands share: options, the model, progress bars, interruption, output."""

from __future__ import annotations

import importlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import Interrupted, SepMEError, out_of_memory

log = Console(stderr=True, highlight=False, markup=False, emoji=False)  # what users call things is no markup

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Files = Annotated[list[Path], typer.Argument(help="Delta files.")]
Model = Annotated[str, typer.Argument(help="'demo', a diffusers folder or a .safetensors checkpoint (SD 1.x, 2.x, XL).")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
DType = Annotated[str, typer.Option(help="The model's precision: float32, float16 or bfloat16; deltas are trained in float32.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of CLIP's tokenizer, for single-file checkpoints.", envvar="SEPME_TOKENIZER")]
PredictionType = Annotated[str | None, typer.Option(help="What the UNet predicts, epsilon or v_prediction; found out if not given.")]
Size = Annotated[int | None, typer.Option(help="Pixels of an image's side; the model's own if not given.")]


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
    if as_json:
        print(json.dumps(data, indent=2, sort_keys=True))
    else:
        show()


def load_host(
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    tokenizer: Path | None = None,
    prediction: str | None = None,
    size: int | None = None,
) -> Any:
    try:
        import diffusers
        import transformers

        from ..hosts.diffusers import DiffusersHost
        from ..hosts.loading import DTYPES, LoadOptions
    except ImportError as error:
        if out_of_memory(error):
            raise
        raise SepMEError(
            f"This command needs diffusers and transformers ({error.name} is missing); run: pip install 'comfyui-sepme[cli]'."
        ) from None
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise SepMEError(f"There is no precision {dtype!r}; choose one of {', '.join(DTYPES)}.")
    register_kernels()
    options = LoadOptions(device, DTYPES[dtype], str(tokenizer) if tokenizer else None, prediction, size)
    return DiffusersHost.load(model, options=options)


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
