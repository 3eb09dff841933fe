"""Benchmarks, one file each; what they share is how two sides are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Median seconds of both sides, and the median over pairs of ``first / second``."""

    first: float
    second: float
    ratio: float


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by a clock: the wall's, or ``time.process_time``, which does not count what other programs take."""
    started = clock()
    run()
    return clock() - started


def alternate(
    first: Callable[[], Any], second: Callable[[], Any], pairs: int = 3, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Time two sides by turns, so that whatever else the machine does hits both; the order changes from pair to pair."""
    timed: list[tuple[float, float]] = []
    for i in range(pairs):
        if i % 2:
            b, a = seconds(second, clock), seconds(first, clock)
        else:
            a, b = seconds(first, clock), seconds(second, clock)
        timed.append((a, b))
    return Timing(median(a for a, _ in timed), median(b for _, b in timed), median(a / b for a, b in timed))
