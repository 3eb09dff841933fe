"""SIGKILL at random moments of ``sepme train``: no broken file under a final name, and --resume gives the bytes of an unbroken run.

``python tests/demo/kill.py --times 100``. Commands run in forks of this process, so that torch is imported once.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sepme import cli, files
from sepme.concepts import ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.hosts.diffusers import DiffusersHost
from sepme.model import schedule
from sepme.plan.planner import Planner
from sepme.train import TrainOptions

BOOK = "concepts: [star, circle]"
# lasting training: the momentum never falls to -1; two checkpoints per concept
KINDS = {"closed-form": ["--objective", "closed-form"], "gcirs": ["--steps", "14", "--threshold", "-1", "--batch", "1"]}
MOMENTS = ("timer", "half written", "before rename", "after rename")


def quicken() -> None:
    """Load the model once, before forking; short denoising runs, remembered encodings, a checkpoint every fifth step."""
    host = DiffusersHost.load("demo")
    schedule.TRAJECTORY = schedule.TRAJECTORY._replace(steps=4)
    encode = functools.cache(lambda prompts: DiffusersHost.encode(host, prompts))
    host.encode = lambda prompts, grad=False: encode(tuple(prompts))  # type: ignore[method-assign]
    Planner(host, ConceptBook.loads(BOOK))  # remembers the encodings of the corpus
    cli.options.ModelOptions.load = lambda *_: host  # type: ignore[method-assign]
    TrainOptions.for_mode = staticmethod(functools.partial(TrainOptions.for_mode, checkpoint_every=5))  # type: ignore[method-assign]


def fork(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command line in a fork; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["sepme", *arguments]
        prepare()
        cli.main()
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def finish(pid: int) -> int:
    """The exit code of a fork; -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(moment: str, at: int) -> Callable[[], None]:
    """Make this process kill itself in its ``at``-th write: with half of the bytes on disk, before or after the rename."""
    count = 0

    def due() -> bool:
        nonlocal count
        count += 1
        return count == at

    def prepare() -> None:
        fdopen, replace = os.fdopen, os.replace

        def half(handle: int, *args: Any, **kwargs: Any) -> Any:
            file = fdopen(handle, *args, **kwargs)
            write = file.write

            class Half:
                def __enter__(self) -> Half:
                    return self

                def __exit__(self, *error: object) -> None:
                    file.close()

                def write(self, data: bytes) -> None:
                    if due():
                        write(data[: len(data) // 2])
                        file.flush()
                        die()
                    write(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

            return Half()

        def rename(source: Any, target: Any) -> None:
            last = due()
            if last and moment == "before rename":
                die()
            replace(source, target)
            if last:
                die()

        if moment == "half written":
            files.os.fdopen = half  # type: ignore[assignment]
        else:
            files.os.replace = rename  # type: ignore[assignment]

    return prepare


def check_folder(folder: Path) -> None:
    """Every file under a final name is whole; anything else is a hidden .part."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.endswith(".checkpoint.safetensors"):
            load_file(path)
        elif path.suffix == ".safetensors":
            ConceptDelta.load(path)
        else:
            assert path.match(".*.part"), path


def contents(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def run(times: int, seed: int, kinds: list[str], budget: float = float("inf")) -> Counter[str]:
    """Kill and resume ``times`` times, or until ``budget`` seconds are over; counts what happened."""
    rng, seen = random.Random(seed), Counter[str]()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "book.yaml").write_text(BOOK)
        log = root / "log"
        whole: dict[str, tuple[float, dict[str, bytes]]] = {}
        for i in range(times):
            if time.monotonic() - start > budget:
                break
            kind = kinds[i % len(kinds)]
            command = ["train", "demo", "--nearby", "0", "--no-thumbnail", str(root / "book.yaml"), *KINDS[kind], "-o"]
            if kind not in whole:
                began = time.monotonic()
                assert finish(fork([*command, str(root / kind)], log)) == 0, log.read_text()
                whole[kind] = (time.monotonic() - began, contents(root / kind))
            seconds, expected = whole[kind]
            out = root / "broken"
            shutil.rmtree(out, ignore_errors=True)
            extra: list[str] = []
            for _ in range(rng.choice((1, 1, 2))):  # the resumed run may be killed as well
                moment = rng.choice(MOMENTS)
                if moment == "timer":
                    pid = fork([*command, str(out), *extra], log)
                    time.sleep(rng.uniform(0, seconds))
                    os.kill(pid, signal.SIGKILL)
                else:
                    writes = 2 if kind == "closed-form" else 6  # deltas, and two checkpoints each
                    pid = fork([*command, str(out), *extra], log, dying(moment, rng.randint(1, writes)))
                code = finish(pid)
                assert code in (0, -signal.SIGKILL), log.read_text()
                seen["killed" if code else "ended before"] += 1
                seen[f"killed: {moment}"] += code != 0
                seen["left a .part"] += any(out.glob(".*.part")) if out.exists() else 0
                seen["left a checkpoint"] += any(out.glob("*.checkpoint.safetensors")) if out.exists() else 0
                check_folder(out)
                extra = ["--resume"]
            assert finish(fork([*command, str(out), "--resume"], log)) == 0, log.read_text()
            assert contents(out) == expected, (kind, sorted(contents(out)))
            seen[f"resumed to the same bytes: {kind}"] += 1
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--budget", type=float, default=float("inf"), help="Seconds after which no further run is begun.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quicken()
    for what, count in sorted(run(arguments.times, arguments.seed, arguments.kinds, arguments.budget).items()):
        print(f"{count:6} {what}")
