"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]  # what is going on, done, total


def silent(what: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""
