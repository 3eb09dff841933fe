"""``sepme demo``: erase the embedded model's twelve concepts one by one and together, and measure everything on pictures.

Every condition draws the same prompts with the same seeds at the same batch shape, so that a picture that nothing should
touch can be compared with the stock model's bit by bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..apply.composition import Composition
from ..apply.toggles import Toggles
from ..concepts import Concept, ConceptBook, file_name
from ..delta.concept_delta import ConceptDelta
from ..files import write_atomically
from ..hosts.diffusers import DEMO, DiffusersHost
from ..plan.gate import ordinary_prompts
from ..plan.planner import Planner
from ..train import Job, Progress, TrainOptions, each, train_book
from .classifier import Classifier, load_classifier
from .world import COLOUR_NAMES, OBJECTS, SMALL, STYLES, Scene, World

OnProgress = Callable[[str, int, int], None]
PRESERVED = ("{}", "a {} picture", "a picture, {}", "a drawing, {}")
STEPS, GUIDANCE = 8, 3.0


def demo_book() -> ConceptBook:
    """The twelve concepts of the embedded model; what else it can draw, colours, is preserved."""
    concepts = tuple(Concept(name, SMALL.prompts_of(name)) for name in OBJECTS + STYLES)
    return ConceptBook(concepts, tuple(p.format(c) for c in COLOUR_NAMES for p in PRESERVED))


class Picture(NamedTuple):
    """One picture to draw: prompt, seed, and what a classifier should read: (head, class); head 0 object, 1 style."""

    prompt: str
    seed: int
    head: int = 0
    label: int = 0


def own_pictures(concept: Concept, count: int) -> list[Picture]:
    """Pictures of the concept's own prompts."""
    head, label = SMALL.place_of(concept.name)
    first = 1000 * (head * len(OBJECTS) + label)
    return [Picture(concept.prompts[i % len(concept.prompts)], first + i, head, label) for i in range(count)]


def cooccurring_pictures(name: str, count: int) -> list[Picture]:
    """Prompts that hold this concept and one of the other kind, which must stay; labels are the other's."""
    head, label = SMALL.place_of(name)
    others = STYLES if head == 0 else OBJECTS
    pictures = []
    for i in range(count):
        other = others[i % len(others)]
        text = SMALL.together(name, other, i)
        pictures.append(Picture(text, 50_000 + 1000 * (head * len(OBJECTS) + label) + i, 1 - head, others.index(other)))
    return pictures


def unrelated_pictures(count: int) -> list[Picture]:
    """Prompts that hold no concept: colours, and ordinary prompts from the half of the corpus that calibrated nothing."""
    prompts = [f"a {c} picture" for c in COLOUR_NAMES] + list(ordinary_prompts()[1::2])
    return [Picture(prompts[i], 90_000 + i) for i in range(count)]


class Studio:
    """Draws batches of pictures under a composition and reads them."""

    def __init__(self, host: DiffusersHost, classifier: Classifier, steps: int = STEPS) -> None:
        self.host, self.classifier, self.steps = host, classifier, steps
        host.pipe.vae.to(memory_format=torch.channels_last)  # decodes twice as fast on a CPU

    def latents(
        self, pictures: Sequence[Picture], composition: Composition | None = None, toggles: Toggles | None = None, gate: bool = True
    ) -> Tensor:
        return self.host.generate(
            [p.prompt for p in pictures], [p.seed for p in pictures], composition, toggles,
            steps=self.steps, guidance=GUIDANCE, gate=gate, latents_only=True,
        )  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.host.pipe.vae.decode(latents).sample.float().clamp(-1, 1)

    def correct(self, images: Tensor, pictures: Sequence[Picture]) -> Tensor:
        """Whether each picture shows its label, ``(n,)`` bool."""
        read = self.classifier.predict(images)
        heads, labels = torch.tensor([p.head for p in pictures]), torch.tensor([p.label for p in pictures])
        return read.gather(1, heads[:, None]).squeeze(1) == labels


class Reference(NamedTuple):
    """The stock model's pictures of one set."""

    pictures: list[Picture]
    latents: Tensor
    images: Tensor
    correct: Tensor


def classifier_accuracy(classifier: Classifier, count: int = 1050, world: World = SMALL) -> dict[str, float]:
    """Accuracy on freshly drawn pictures that training never saw, by head."""
    generator = torch.Generator().manual_seed(987_654)
    total = world.heads
    scenes = [Scene(i % total[0], i // total[0] % total[1], i % total[2]) for i in range(count)]
    images = torch.stack([world.draw(s, generator) for s in scenes]) * 2 - 1
    right = classifier.predict(images) == torch.tensor(scenes)
    return dict(zip(("object", "style", "colour"), right.float().mean(0).tolist(), strict=True))


def make_all(
    host: DiffusersHost, planner: Planner, names: Sequence[str], options: TrainOptions, folder: Path, on_progress: OnProgress
) -> tuple[dict[str, ConceptDelta], float]:
    """Make and save the deltas of all concepts; seconds per concept (planning included)."""
    deltas: dict[str, ConceptDelta] = {}
    started = time.perf_counter()

    def tell(step: Progress | None = None) -> None:
        on_progress(f"{options.objective}: training", len(deltas), len(names))

    def save(delta: ConceptDelta) -> None:
        path = delta.save(folder / f"{file_name(delta.concept.name)}.safetensors")
        deltas[delta.concept.name] = ConceptDelta.load(path)
        tell()

    tell()
    train_book(Job(planner, host, options, names, each(names)), save, tell)
    return deltas, (time.perf_counter() - started) / len(names)


class Story:
    """All conditions of the demo for one set of deltas."""

    def __init__(
        self, studio: Studio, names: Sequence[str], own: dict[str, Reference], both: dict[str, Reference], other: Reference
    ) -> None:
        self.studio, self.names, self.own, self.both, self.other = studio, list(names), own, both, other

    def others(self, name: str) -> Reference:
        """As many pictures of the other concepts as of one, each at the place in its batch where stock drew it."""
        rest = [n for n in self.names if n != name]
        at = [(rest[i % len(rest)], i) for i in range(len(self.own[name].pictures))]
        parts = [[r[i] for r in self.own[n]] for n, i in at]
        pictures, latents, images, correct = zip(*parts, strict=True)
        return Reference(list(pictures), torch.stack(latents), torch.stack(images), torch.stack(correct))

    def measure(self, composition: Composition, gate: bool, tick: Callable[[], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures of one composition with the gate on or off, and pictures for the report by condition."""
        alone = {n: {m: float(m == n) for m in self.names} for n in self.names}
        concepts: dict[str, dict[str, float]] = {}
        restored, untouched = [], []
        show: dict[str, list[Tensor]] = {"alone": [], "all": [], "restored": [], "both": []}

        def draw_set(reference: Reference, toggles: Toggles) -> tuple[float, Tensor, Tensor]:
            """Accuracy, which pictures equal stock's bit for bit, and the pictures."""
            latents = self.studio.latents(reference.pictures, composition, toggles, gate)
            same = (latents == reference.latents).flatten(1).all(1)
            images, correct = reference.images, reference.correct
            if not same.all():  # decoding is deterministic, so equal latents are equal pictures
                images = self.studio.decode(latents)
                correct = self.studio.correct(images, reference.pictures)
            tick()
            return float(correct.float().mean()), same, images

        for name in self.names:
            own, both, rest = self.own[name], self.both[name], self.others(name)
            single, _, pictures = draw_set(own, alone[name])
            show["alone"].append(pictures)
            everything, _, pictures = draw_set(own, {})
            show["all"].append(pictures)
            eleven, same, pictures = draw_set(own, {name: 0.0})
            show["restored"].append(pictures)
            restored.append(same)
            one, same, _ = draw_set(rest, alone[name])
            untouched.append(same)
            together, _, pictures = draw_set(both, alone[name])
            show["both"].append(pictures)
            stock = float(own.correct.float().mean())
            concepts[name] = {
                "stock_accuracy": stock,
                "erased_accuracy_single": single,
                "erased_accuracy_all": everything,
                "kept_accuracy_drop_one_on": float(rest.correct.float().mean()) - one,
                "kept_accuracy_drop_eleven_on": stock - eleven,
                "cooccurring_drop": float(both.correct.float().mean()) - together,
                "restored_bit_identical": float(restored[-1].float().mean()),
                "untouched_bit_identical": float(untouched[-1].float().mean()),
            }
        untouched.append(draw_set(self.other, {})[1])
        figures: dict[str, Any] = {k: sum(c[k] for c in concepts.values()) / len(concepts) for k in next(iter(concepts.values()))}
        figures["kept_accuracy_drop"] = max(figures["kept_accuracy_drop_one_on"], figures["kept_accuracy_drop_eleven_on"])
        figures["restored_bit_identical"] = float(torch.cat(restored).float().mean())
        figures["untouched_bit_identical"] = float(torch.cat(untouched).float().mean())
        return figures | {"concepts": concepts}, {k: torch.stack(v) for k, v in show.items()}

    def half_precision(self, half: Studio, composition: Composition, gate: bool, stock: dict[str, Tensor]) -> dict[str, float]:
        """Bit identity of latents in bfloat16, of pictures mixed from all concepts, each with its own tags in its prompt."""
        count = len(self.other.pictures)
        mixed = [self.own[self.names[i % len(self.names)]].pictures[i] for i in range(count)]
        others = {n: [m for m in self.names if m != n] for n in self.names}
        sets = {
            "restored": [p._replace(prompt=f"{p.prompt} <keep:{self.names[i % len(self.names)]}>") for i, p in enumerate(mixed)],
            "known": [
                p._replace(prompt=p.prompt + "".join(f" <keep:{m}>" for m in others[self._neighbour(i)])) for i, p in enumerate(mixed)
            ],
            "unrelated": self.other.pictures,
        }
        if not stock:
            stock |= {"restored": half.latents(mixed), "unrelated": half.latents(self.other.pictures)}
            stock["known"] = stock["restored"]
        same = {k: (half.latents(v, composition, gate=gate) == stock[k]).flatten(1).all(1).float() for k, v in sets.items()}
        return {
            "restored_bit_identical_bf16": float(same["restored"].mean()),
            "untouched_bit_identical_bf16": float(torch.cat([same["known"], same["unrelated"]]).mean()),
        }

    def _neighbour(self, i: int) -> str:
        """The concept that is on while picture i, of another concept, is drawn."""
        return self.names[(i + 1) % len(self.names)]


def interference(host: DiffusersHost, planner: Planner, composition: Composition, gate: bool, count: int = 4) -> Tensor:
    """``(N, N)``: how far delta i alone moves the predicted noise of j's prompts, relative to their representation r (Eq. 2)."""
    from ..apply.projector import KVProjector

    n, generator = len(composition.deltas), torch.Generator().manual_seed(77)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    t = torch.full((count,), 600)
    matrix = torch.zeros(n, n)
    with torch.no_grad():
        nothing = host.predict(x, t, planner.prompts.empty.context.expand(count, -1, -1))
        for j, name in enumerate(composition.names):
            context = planner.prompts.encodings[name].context[:count]
            stock = host.predict(x, t, context)
            for i in range(n):
                on = torch.zeros(n)
                on[i] = 1
                with KVProjector(host.attention_layers(), composition, gate=gate).attached(on):
                    matrix[i, j] = (host.predict(x, t, context) - stock).norm() / (stock - nothing).norm()
    return matrix


def tell(host: DiffusersHost, out: Path, images: int = 20, concepts: int = 12, on_progress: OnProgress = lambda *_: None) -> dict[str, Any]:
    """Run the whole demo and write ``deltas/``, ``report.html`` and ``metrics.json`` into ``out``; returns the metrics."""
    from .report import write_report

    started = time.perf_counter()
    book = demo_book()
    # every other one is a style, so that a short demo shows both
    order = [c.name for pair in zip(book.concepts[:6], book.concepts[6:], strict=True) for c in pair]
    names = [c.name for c in book.concepts if c.name in order[: max(2, min(concepts, 12))]]
    book = ConceptBook(tuple(book[n] for n in names), book.preserve)
    classifier = load_classifier(DEMO)
    studio = Studio(host, classifier)
    planner = Planner(host, book)

    def reference(pictures: list[Picture]) -> Reference:
        latents = studio.latents(pictures)
        decoded = studio.decode(latents)
        return Reference(pictures, latents, decoded, studio.correct(decoded, pictures))

    own, both = {}, {}
    for i, name in enumerate(names):
        on_progress("Stock pictures", i, len(names))
        own[name] = reference(own_pictures(book[name], images))
        both[name] = reference(cooccurring_pictures(name, images))
    other = reference(unrelated_pictures(images))
    on_progress("Stock pictures", len(names), len(names))
    story = Story(studio, names, own, both, other)
    half = Studio(DiffusersHost.load("demo", torch.bfloat16), classifier)
    half_stock: dict[str, Tensor] = {}

    results: dict[str, dict[str, Any]] = {}
    shows: dict[str, dict[str, Tensor]] = {}
    matrices: dict[str, Tensor] = {}
    all_deltas: dict[str, dict[str, ConceptDelta]] = {}
    for objective, key in (("gcirs", "gcirs"), ("closed-form", "closed_form")):
        deltas, seconds = make_all(host, planner, names, TrainOptions.for_mode(objective=objective), out / "deltas" / key, on_progress)
        composition = Composition(tuple(deltas.values()))
        certificates = [d.certificate for d in deltas.values()]
        gated: dict[bool, dict[str, Any]] = {}
        for gate in (True, False):
            what = f"{'G-CiRs' if key == 'gcirs' else 'Closed form'}: pictures, gate {'on' if gate else 'off'}"
            total, done = 5 * len(names) + 1, 0

            def tick(what: str = what, total: int = total) -> None:
                nonlocal done
                done += 1
                on_progress(what, done, total)

            figures, show = story.measure(composition, gate, tick)
            figures |= story.half_precision(half, composition, gate, half_stock)
            linear = max(c.worst_leakage for c in certificates)
            figures["leakage_linear_max"] = linear
            figures["leakage_gated_max"] = max(c.worst_leakage_gated for c in certificates) if gate else linear
            gated[gate] = figures
            shows[f"{key}{'' if gate else '_gate_off'}"] = show
            matrices[f"{key}{'' if gate else '_gate_off'}"] = interference(host, planner, composition, gate)
        results[key] = gated[True] | {
            "false_touch_rate": sum(c.false_touch_rate for c in certificates) / len(certificates),
            "kept_energy_min": min(c.kept_energy for c in certificates),
            "delta_bytes_max": max((out / "deltas" / key / f"{file_name(n)}.safetensors").stat().st_size for n in names),
            "seconds_per_concept": seconds,
            "gate_off": gated[False],
        }
        all_deltas[key] = deltas

    per_concept = {k: r.pop("seconds_per_concept") for k, r in results.items()}
    metrics: dict[str, Any] = results["gcirs"] | {
        "closed_form": results["closed_form"],
        "classifier_accuracy": classifier_accuracy(classifier),
        "seconds_train_per_concept": per_concept["gcirs"],
        "seconds_closed_form_per_concept": per_concept["closed_form"],
        "images_per_condition": images,
        "denoising_steps": STEPS,
        "threads": torch.get_num_threads(),
    }
    write_report(out / "report.html", metrics, names, {"own": own, "both": both}, shows, matrices, all_deltas)
    metrics["seconds_total"] = time.perf_counter() - started
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True).encode())
    return metrics
