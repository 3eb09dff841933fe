"""Long work behind a page: it runs in a thread of its own, and the page sees a snapshot of it twice a second."""

from __future__ import annotations

import html
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...sepme.errors import Interrupted, SepMEError, out_of_memory
from ...sepme.progress import OnProgress
from . import host

EVERY = 0.5  # seconds
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c", "#0891b2")
WIDTH, HEIGHT, POINTS = 400, 160, 300


@dataclass
class TaskStatus:
    """What the page sees; the work writes it. ``losses`` by concept."""

    text: str = "Waiting for the queue"
    done: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)

    def show(self, text: str, done: float, total: float) -> None:
        """Set the text, and how much of ``total`` is done."""
        self.text, self.done = text, done / total if total else 0.0


class Work(Protocol):
    """What :func:`follow` runs in a thread of its own."""

    def __call__(self, progress: TaskStatus) -> str:
        """Do it, and return what to say at the end as HTML."""
        ...


def follow(work: Work, every: float = EVERY) -> Iterator[tuple[str, str]]:
    """Run work; status and loss plot as HTML, until it has ended."""
    progress, last = TaskStatus(), [""]

    def run() -> None:
        try:
            last[0] = work(progress)
        except Interrupted:
            last[0] = "<p>Stopped. What was finished is saved; train again to go on from where it stopped.</p>"
        except SepMEError as error:
            last[0] = f'<p class="sepme-error">{html.escape(str(error))}</p>'
        except Exception as error:
            traceback.print_exc()
            hint = "The memory is full; close other programs, or take fewer concepts." if out_of_memory(error) else "See the console."
            last[0] = f'<p class="sepme-error">{html.escape(type(error).__name__)}: it failed. {hint}</p>'

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(every)
        if thread.is_alive():
            yield bar(progress), plot(dict(progress.losses))
    yield last[0], plot(progress.losses)


def shown(progress: TaskStatus) -> OnProgress:
    """What the library tells of its progress, shown; the user may interrupt there."""

    def on_progress(what: str, done: int, total: int) -> None:
        host.check_interrupted()
        progress.show(what, done, total)

    return on_progress


def bar(progress: TaskStatus) -> str:
    """Text and progress bar as HTML."""
    share = min(max(progress.done, 0.0), 1.0)
    return f'<p>{html.escape(progress.text)}</p><div class="sepme-progress"><div style="width: {100 * share:.0f}%"></div></div>'


def plot(losses: Mapping[str, Sequence[float]]) -> str:
    """Curves of the losses as SVG, on one scale; nothing before the second step."""
    curves = {name: [float(v) for v in values] for name, values in losses.items() if len(values) > 1}
    if not curves:
        return ""
    low, high = min(min(v) for v in curves.values()), max(max(v) for v in curves.values())
    longest = max(len(v) for v in curves.values()) - 1
    parts = []
    for i, (name, values) in enumerate(curves.items()):
        stride = max(1, len(values) // POINTS)
        points = " ".join(
            f"{WIDTH * step / longest:.1f},{HEIGHT * (high - values[step]) / ((high - low) or 1):.1f}"
            for step in range(0, len(values), stride)
        )
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        parts.append(
            f'<text x="{WIDTH - 4}" y="{14 * (i + 1)}" text-anchor="end" font-size="11" fill="{colour}">'
            f"{html.escape(name)} {values[-1]:.5f}</text>"
        )
    label = (
        f'<text x="4" y="{HEIGHT + 14}" font-size="11" fill="currentColor">loss by step (0 to {longest}), {low:.4g} to {high:.4g}</text>'
    )
    return f'<svg class="sepme-plot" viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img" aria-label="Loss">{"".join(parts)}{label}</svg>'


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; floats to three digits."""

    def cell(value: object, tag: str = "td") -> str:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        return f"<{tag}>{html.escape(text)}</{tag}>"

    body = "".join(f"<tr>{''.join(cell(v) for v in row)}</tr>" for row in rows)
    return f'<table class="sepme-table"><tr>{"".join(cell(h, "th") for h in heads)}</tr>{body}</table>'
