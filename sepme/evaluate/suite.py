"""What an evaluation does, as data: concepts, prompts, methods, scenes. YAML in, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..concepts import Concept, ConceptBook
from ..errors import SepMEError
from .methods import KEYS

MAX_BYTES = 1 << 20
PARTS = ("methods", "interference", "subsets", "scenes", "toggles", "strengths", "order", "capacity")

OWN = ("name", "batch", "methods", "settings", "toggles", "subsets", "strengths", "counts", "scenes", "parts")


def with_article(text: str) -> str:
    """Write "an" where "a" stands before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


@dataclass(frozen=True)
class Templates:
    """Prompts of a kind of concepts: what deltas are made from, and what they never see."""

    trained: tuple[str, ...]
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """One evaluation.

    Attributes:
        judge: ``demo`` (the embedded classifier) or ``clip`` (zero-shot, weights given on the command line).
        concepts: names by kind.
        templates: by kind, with {} for the name.
        both: prompts with a {field} for each of two kinds.
        preserve: prompts that must not change.
        unrelated: prompts that hold no concept.
        synonyms: prompts with other words, by concept.
        neighbours: names by kind that the classifier knows too and that no method is told of.
        images: pictures per concept and condition.
        steps, guidance: of drawing, ``batch`` at once.
        seed: first of all.
        plan: fields of PlanOptions.
        methods: keys, in the order of the report.
        settings: of methods, see ``MethodMaker``.
        attack, resurgence: budgets.
        toggles: random cycles.
        subsets: random sets of concepts erased together.
        strengths: of the sweep.
        counts: of the capacity curve.
        scenes: name, events ({erase: [names]} or {recover: [names]}) and, where only one kind of concepts is looked at, kind;
            pictures: at least so many of each group of concepts (erased, recovered, regular) instead of ``images`` of each concept.
        parts: which of :data:`PARTS` are done.
    """

    name: str
    judge: str
    concepts: Mapping[str, tuple[str, ...]]
    templates: Mapping[str, Templates]
    both: tuple[str, ...]
    preserve: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    neighbours: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: int = 6
    batch: int = 32
    steps: int = 25
    guidance: float = 7.5
    seed: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = KEYS
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    resurgence: Mapping[str, Any] = field(default_factory=dict)
    toggles: int = 100
    subsets: int = 4
    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    counts: tuple[int, ...] = (10, 30)
    scenes: tuple[Mapping[str, Any], ...] = ()
    parts: tuple[str, ...] = PARTS

    @property
    def kinds(self) -> dict[str, str]:
        """Kind by concept and neighbour."""
        return {name: kind for given in (self.concepts, self.neighbours) for kind, names in given.items() for name in names}

    @property
    def names(self) -> list[str]:
        """All concepts, kind by kind."""
        return [name for names in self.concepts.values() for name in names]

    def prompts(self, name: str, unseen: bool = False) -> tuple[str, ...]:
        """A concept's prompts: those that deltas are made from, or those that they never see (synonyms included)."""
        templates = self.templates[self.kinds[name]]
        made = tuple(with_article(t.format(name)) for t in (templates.unseen if unseen else templates.trained))
        return made + (self.synonyms.get(name, ()) if unseen else ())

    def book(self, names: list[str] | None = None) -> ConceptBook:
        """The concepts (all by default) and what is preserved."""
        return ConceptBook(tuple(Concept(n, self.prompts(n)) for n in (self.names if names is None else names)), self.preserve)

    def cooccurring(self, name: str) -> list[tuple[str, str]]:
        """Prompts that hold this concept and one of another kind, and that other's name."""
        kind = self.kinds[name]
        pairs = [(k, o) for k, names in self.concepts.items() if k != kind for o in names]
        usable = [t for t in self.both if "{" + kind + "}" in t]
        found = []
        for i, (other_kind, other) in enumerate(pairs):
            text = usable[i % len(usable)].format(**{kind: name, other_kind: other})
            found.append((with_article(text), other))
        return found

    def facts(self) -> dict[str, Any]:
        """What every result depends on; what single results depend on besides is left out (:data:`OWN`)."""
        return {k: v for k, v in json.loads(json.dumps(asdict(self))).items() if k not in OWN}

    @staticmethod
    def load(source: str) -> Suite:
        """A shipped suite by name, or a YAML file.

        Raises:
            SepMEError: no such file or suite, not readable, or an entry that is missing, unknown or of the wrong kind.
        """
        shipped = resources.files(__package__) / "suites" / f"{source}.yaml"
        try:
            text = shipped.read_text(encoding="utf-8") if "/" not in source and shipped.is_file() else _read(Path(source))
            data = yaml.safe_load(text)
            if isinstance(data, dict) and "like" in data:
                base = yaml.safe_load((resources.files(__package__) / "suites" / f"{data.pop('like')}.yaml").read_text(encoding="utf-8"))
                data = base | data
        except OSError:
            raise SepMEError(f"The suite {source} is like one that is not shipped; shipped ones: {', '.join(_shipped())}.") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            raise SepMEError(f"The suite {source} is not readable YAML{where}; check its indentation and quotes.") from None
        return parse(data, source)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SepMEError(f"The suite {path} is larger than {MAX_BYTES >> 20} MB; suites are short.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise SepMEError(f"There is no suite {path}; name a YAML file or one of {', '.join(_shipped())}.") from None


def _shipped() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files(__package__) / "suites").iterdir())


def parse(data: Any, source: str) -> Suite:
    """Check and build a suite from parsed YAML."""

    def wrong(what: str) -> SepMEError:
        return SepMEError(f"The suite {source}: {what}.")

    known = {f.name for f in fields(Suite)}
    if not isinstance(data, dict) or not {"name", "judge", "concepts", "templates", "both"} <= set(data):
        raise wrong("it needs the entries name, judge, concepts, templates and both")
    for key in data:
        if key not in known:
            raise wrong(f"there is no entry {str(key)[:40]!r}; known ones: {', '.join(sorted(known))}")
    try:
        made = dict(data)
        made["concepts"] = {str(k): tuple(str(n) for n in v) for k, v in data["concepts"].items()}
        made["templates"] = {k: Templates(tuple(t["trained"]), tuple(t["unseen"])) for k, t in data["templates"].items()}
        for key in ("synonyms", "neighbours"):
            made[key] = {str(k): tuple(str(n) for n in v) for k, v in (data.get(key) or {}).items()}
        for key in ("both", "preserve", "unrelated", "methods", "strengths", "counts", "scenes", "parts"):
            if key in data:
                made[key] = tuple(data[key])
        suite = Suite(**made)
        suite.book()
        for name in suite.names:
            assert suite.prompts(name, unseen=True)
            suite.cooccurring(name)
        assert set(suite.synonyms) <= set(suite.names), "synonyms of no concept"
        assert not {n for names in suite.neighbours.values() for n in names} & set(suite.names), "a neighbour that is a concept"
        assert set(suite.neighbours) <= set(suite.templates), "neighbours of no kind"
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError) as error:
        if isinstance(error, SepMEError):
            raise
        raise wrong(f"an entry is missing or of the wrong kind ({type(error).__name__}: {str(error)[:80]})") from None
    if suite.judge not in ("demo", "clip") or not set(suite.methods) <= set(KEYS) or not set(suite.parts) <= set(PARTS):
        raise wrong(f"judge is demo or clip, methods are among {', '.join(KEYS)}, parts among {', '.join(PARTS)}")
    names = set(suite.names)
    for scene in suite.scenes:
        if scene.get("kind", next(iter(suite.concepts))) not in suite.concepts:
            raise wrong(f"a scene is of kind {str(scene['kind'])[:40]!r}; kinds are {', '.join(suite.concepts)}")
        if not (type(given := scene.get("pictures", 1)) is int and 0 < given <= 10**6):
            raise wrong(f"a scene has {str(given)[:20]!r} pictures; give a whole number from 1")
        for event in scene.get("events", [{}]):
            if not (set(event) in ({"erase"}, {"recover"}) and set(next(iter(event.values()))) <= names):
                raise wrong(f"a scene has an event {str(event)[:60]}; events are erase or recover with names of concepts")
    return suite
