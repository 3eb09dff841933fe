"""All methods of an evaluation under their keys: this project's, published losses with weight decoupling and without, other baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..concepts import Concept, ConceptBook, file_name
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..files import write_atomically
from ..model.layers import weights
from ..model.protocols import EvaluationHost
from ..plan.directions import PlanOptions
from ..plan.planner import Planner
from ..progress import OnProgress, silent
from ..train import Job, Progress, TrainOptions, each, train_book
from ..train.objectives import OBJECTIVES
from .closed_forms import speed, uce
from .erasers import Eraser, KeywordFilter, Merged, NegativePrompt, Separable, summed
from .lora import train_lora

OWN = {  # settings by key
    "sepme_gcirs": {"objective": "gcirs"},
    "sepme_closed_form": {"objective": "closed-form"},
    "sepme_gcirs_context": {"objective": "gcirs", "edit": "context"},
    "sepme_closed_form_context": {"objective": "closed-form", "edit": "context"},
}
BASELINES = tuple(  # as published; and with weight decoupling, as <name>_wd
    name for name in OBJECTIVES if name not in {settings["objective"] for settings in OWN.values()}
)
KEYS = (
    *OWN, *BASELINES, *(f"{name}_wd" for name in BASELINES),
    "uce", "speed", "lora_sum", "negative_prompt", "keyword_filter",
)  # fmt: skip
EVERYTHING = "everything"


@dataclass(frozen=True)
class Made:
    """A method's eraser, and the seconds that making it took for all concepts: processor time, on a GPU by the clock."""

    eraser: Eraser
    seconds: float


@dataclass
class MethodMaker:
    """Makes methods, each in a folder of its own; what is there from the same settings is not made again.

    Attributes:
        settings: by key, :class:`TrainOptions` fields and ``anchor`` (AbConcept's), ``rank`` (LoRA's), ``ridge``, ``preserve`` (UCE's).
        check: called between steps; it may raise :class:`~sepme.errors.Interrupted`.
    """

    host: EvaluationHost
    book: ConceptBook
    plan: PlanOptions
    folder: Path
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    on_progress: OnProgress = silent
    check: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        for key in self.settings:
            if key not in KEYS:
                raise SepMEError(f"There is no method {key!r}; choose from {', '.join(KEYS)}.")
        self._planners: dict[str, Planner] = {}
        self._clock = time.process_time if self.host.device.type == "cpu" else time.perf_counter

    def make(self, key: str) -> Made:
        """Make one method.

        Raises:
            SepMEError: an unknown key or setting.
        """
        if key not in KEYS:
            raise SepMEError(f"There is no method {key!r}; choose from {', '.join(KEYS)}.")
        given = dict(self.settings.get(key, {}))
        if key in ("negative_prompt", "keyword_filter"):
            return Made(NegativePrompt() if key == "negative_prompt" else KeywordFilter(), 0.0)
        if key in ("uce", "speed"):
            return self._closed(key, given)
        if key == "lora_sum":
            return self._lora(given)
        own = OWN.get(key, {"objective": key.removesuffix("_wd")})
        planner = self._planner(given.pop("anchor", None))
        if key in BASELINES:
            published = {"source": OBJECTIVES[key].source} | given | own | {"mode": "unrestricted"}
            return self._published(key, planner, _options(key, published))
        options = _options(key, given | own | {"mode": "subspace"})
        planner.plan_all()
        deltas, seconds = self._deltas(key, planner, options, planner.prompts.names)
        return Made(Separable(list(deltas.values())), seconds)

    def _planner(self, anchor: str | None = None) -> Planner:
        """Plans are shared by all methods that have the same anchors."""
        key = anchor or ""
        if key not in self._planners:
            concepts = self.book.concepts if anchor is None else tuple(replace(c, anchor=anchor) for c in self.book.concepts)
            self._planners[key] = Planner(self.host, replace(self.book, concepts=concepts), self.plan, on_progress=self.on_progress)
        return self._planners[key]

    def _published(self, key: str, planner: Planner, options: TrainOptions) -> Made:
        """Unrestricted fine-tuning, each concept by itself and all at once (several fine-tunings have no other way to be combined
        than to be added, which is worse than one of all)."""
        deltas, seconds = self._deltas(key, planner, options, planner.prompts.names)
        prompts = tuple(p for c in planner.book.concepts for p in c.prompts)
        anchor = planner.book.concepts[0].anchor
        joint = Planner(self.host, ConceptBook((Concept(EVERYTHING, prompts, anchor),), planner.book.preserve), self.plan, ())
        together, more = self._deltas(key, joint, replace(options, steps=2 * options.steps), [EVERYTHING])
        size = 2 * sum(y.numel() for d in deltas.values() for y in d.up.values())  # weights as float16
        return Made(Merged(summed(deltas, together[EVERYTHING]), size), seconds + more)

    def _deltas(self, key: str, planner: Planner, options: TrainOptions, names: list[str]) -> tuple[dict[str, ConceptDelta], float]:
        paths = {name: self.folder / key / f"{file_name(name)}.safetensors" for name in names}
        deltas = {name: made for name, path in paths.items() if (made := _made(path, planner, options)) is not None}
        left = [name for name in names if name not in deltas]
        started = self._clock()

        def begin(group: Sequence[str]) -> None:
            nonlocal started
            self.on_progress(f"{key}: training", len(deltas), len(names))
            started = self._clock()

        def save(delta: ConceptDelta) -> None:
            name = delta.concept.name
            delta.save(paths[name])
            _note(paths[name], self._clock() - started)
            deltas[name] = ConceptDelta.load(paths[name])

        todo = each(left, lambda name: paths[name].with_suffix(".checkpoint.safetensors"))
        train_book(Job(planner, self.host, options, names, todo), save, lambda step: self.check(), self.check, begin)
        self.on_progress(f"{key}: training", len(names), len(names))
        return {name: deltas[name] for name in names}, sum(_noted(path) for path in paths.values())

    def _closed(self, key: str, given: dict[str, Any]) -> Made:
        planner, kv = self._planner(), weights(self.host.attention_layers())
        solve = {"uce": uce, "speed": speed}[key](planner, kv, **given)
        started = self._clock()
        changes = solve(frozenset(planner.prompts.names))
        seconds = self._clock() - started
        return Made(Merged(solve, 2 * sum(v.numel() for v in changes.values())), seconds)

    def _lora(self, given: dict[str, Any]) -> Made:
        planner, rank = self._planner(), int(given.pop("rank", 4))
        options = _options("lora_sum", {"objective": "esd"} | given | {"mode": "unrestricted"})
        made: dict[str, dict[str, Any]] = {}
        seconds = 0.0
        size = 0
        for i, name in enumerate(planner.prompts.names):
            self.on_progress("lora_sum: training", i, len(planner.prompts.names))
            path = self.folder / "lora_sum" / f"{file_name(name)}.safetensors"
            started, there = self._clock(), path.exists()

            def on_step(step: Progress) -> None:
                self.check()

            made[name] = train_lora(planner, name, self.host, options, rank, path, on_step, self.check)
            if not there:
                _note(path, self._clock() - started)
            seconds, size = seconds + _noted(path), size + path.stat().st_size
        self.on_progress("lora_sum: training", len(planner.prompts.names), len(planner.prompts.names))

        def changes(erased: frozenset[str]) -> dict[str, Any]:
            chosen = [made[n] for n in sorted(erased)]
            return {name: sum(c[name] for c in chosen) for name in chosen[0]}

        return Made(Merged(changes, size), seconds)


def _options(key: str, given: dict[str, Any]) -> TrainOptions:
    try:
        return TrainOptions.for_mode(**given)
    except TypeError as error:
        raise SepMEError(f"The settings of {key} have an unknown entry ({error}); they are those of sepme train.") from None


def _made(path: Path, planner: Planner, options: TrainOptions) -> ConceptDelta | None:
    """The delta in a file, if it was made with these options for this book."""
    if not path.exists() or not _times(path).exists():
        return None
    delta = ConceptDelta.load(path)
    recipe = delta.recipe
    same = recipe.train == asdict(options) and recipe.book == json.loads(planner.book.dumps())
    return delta if same and recipe.plan == asdict(planner.options) else None


def _times(path: Path) -> Path:
    return path.with_suffix(".seconds")


def _note(path: Path, seconds: float) -> None:
    write_atomically(_times(path), f"{seconds:.3f}".encode())


def _noted(path: Path) -> float:
    return float(_times(path).read_text()) if _times(path).exists() else 0.0
