"""Training: concepts become deltas."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..sepme.concepts import ConceptBook, normalised, split_names
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.errors import SepMEError, out_of_memory
from ..sepme.model.layers import shapes, weights
from ..sepme.model.protocols import Encoding
from ..sepme.plan.nearby import COUNT
from ..sepme.plan.planner import Planner
from ..sepme.train import Job, Progress, TrainOptions, each, plan_options, train_book
from ..sepme.train.increment import context_site
from ..sepme.train.make import check_layers
from ..sepme.train.memory import in_words as size_in_words
from ..sepme.train.memory import needed, told
from ..sepme.train.objectives import OBJECTIVES, described
from ..sepme.train.objectives.closed_form import distance
from ..sepme.train.options import EDITS, MODES
from . import host, queued
from .concepts import join, lines
from .facts import facts_of_delta
from .graph import saved
from .live import Live
from .sockets import CATEGORY, Concepts, Deltas, LossMap, folded
from .thumbnails import with_thumbnails

RUNS = 16  # rows of the largest batch: the denoising runs that x_t is taken from, with guidance


class SepMETrain(io.ComfyNode):
    """Node: one delta per concept that is to be erased, trained on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMETrain",
            display_name="SepME Train",
            category=CATEGORY,
            description="Make one delta for every concept that is to be erased. Training runs on the MODEL as it is, LoRAs included; "
            "the MODEL itself is not changed. Interrupt works at any step.",
            inputs=folded([
                io.Model.Input("model", tooltip="The model to train through, of any family that SepME knows."),
                io.Clip.Input("clip", tooltip="The text encoder that your prompts will use, with its clip skip."),
                Concepts.Input("concepts", tooltip="All known concepts; each delta leaves the others' prompts alone."),
                io.String.Input(
                    "erase", default="*", optional=True,
                    tooltip="Names to erase, separated by commas or lines; * for all. A name with a comma in it stands in double "
                    'quotes: "cruise, tom". The other concepts are only preserved.',
                ),
                io.String.Input(
                    "preserve", multiline=True, default="", optional=True, tooltip="Prompts that must not change at all, one per line."
                ),
                io.Combo.Input(
                    "objective", options=list(OBJECTIVES), default="gcirs", optional=True,
                    tooltip=described(),
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default="subspace", optional=True,
                    tooltip="subspace: small deltas, fast. paper: as published. unrestricted: any change of weights; cannot be combined "
                    "or taken back exactly.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=100_000, optional=True, tooltip="At most; training stops by itself."),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=10.0, step=0.00001, round=False, optional=True,
                    tooltip="0: what suits the mode (0.03, 0.1, 0.00001).",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, control_after_generate=False, optional=True, tooltip="Of every draw."
                ),
                io.Int.Input("max_rank", default=0, min=0, max=4096, optional=True, tooltip="Cap on a delta's rank and size. 0: 8."),
                Deltas.Input(
                    "deltas", optional=True,
                    tooltip="Deltas made earlier: their concepts count as known, and they are passed on with the new ones.",
                ),
                io.Int.Input(
                    "size", default=0, min=0, max=4096, step=8, optional=True,
                    tooltip="Pixels of an image's side. 0: the model's own; 1024 beyond Stable Diffusion.",
                ),
                io.Combo.Input(
                    "edit", options=list(EDITS), default="layers", optional=True,
                    tooltip="What a delta changes. " + " ".join(f"{name}: {text}." for name, text in EDITS.items())
                    + " Flux, Z-Image, Qwen-Image and others have the context alone.",
                ),
                io.Int.Input(
                    "batch", default=0, min=0, max=64, optional=True,
                    tooltip="Pictures of a training step; fewer need less memory. 0: 4.",
                ),
                io.Int.Input(
                    "nearby", default=COUNT, min=0, max=4096, optional=True,
                    tooltip="Words near the concepts that must not change either, of the text encoder's own. 0: none.",
                ),
            ], "objective", "mode", "learning_rate", "max_rank", "size", "edit", "batch", "nearby"),
            outputs=[
                Deltas.Output("deltas_out", display_name="DELTAS"),
                LossMap.Output(
                    "loss_map", display_name="LOSS_MAP",
                    tooltip="For Plot Loss Graph. In closed form: distance of keys and values from the anchor's, before (1) and after.",
                ),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, concepts: ConceptBook, erase: str = "*", preserve: str = "", objective: str = "gcirs",
        mode: str = "subspace", steps: int = 1000, learning_rate: float = 0.0, seed: int = 0, max_rank: int = 0,
        deltas: Sequence[ConceptDelta] | None = None, size: int = 0, edit: str = "layers", batch: int = 0,
        nearby: int = COUNT,
    ) -> io.NodeOutput:  # fmt: skip
        known = tuple(deltas or ())
        given = {"steps": steps, "learning_rate": learning_rate or None, "seed": seed, "edit": edit, "batch": batch or None}
        options = TrainOptions.for_mode(mode, objective, **given)
        book, names = agenda(concepts, erase, lines(preserve), known)
        plan = plan_options(mode, concepts=len(book.concepts), max_rank=max_rank or None, nearby=nearby)
        made: list[ConceptDelta] = []
        takes: list[str] = []  # a sentence, once it is known
        losses: dict[str, list[float]] = {name: [] for name in names}
        bar = host.NodeProgress(2 + len(names))
        encoder = host.text_encoder(clip, model)
        blocks = host.text_blocks(model) if options.needs_model and not options.make_objective().trained else None
        denoiser = host.denoiser_of(model, encoder, size) if options.needs_model and blocks is None else None
        layers = blocks if denoiser is None else denoiser.attention_layers() or None
        live = None if denoiser is None else Live(cls.hidden.unique_id, encoder, denoiser)
        if denoiser is not None:
            check_layers(denoiser, options)
        if layers is not None:
            for delta in known:
                delta.check_fits(shapes(layers), "this MODEL")

        def on_step(step: Progress) -> None:
            losses[step.concept].append(step.loss)
            bar.show(share_done(step, losses[step.concept][0], options))
            if live is not None:
                live.step(step, book[step.concept].prompts[0])

        def save(delta: ConceptDelta) -> None:
            name = delta.concept.name
            sites, read = context_site(delta.d_in), None
            if layers is not None and not delta.edits_context:
                sites, read = weights(layers), blocks.embed if blocks is not None and blocks.embedding else None
            tokens, target = planner.prompts.tokens(name)
            losses[name] = losses[name] or [1.0, distance(sites, tokens, target, delta, read)]
            made.append(delta)

        if denoiser is not None:
            memory: Any = denoiser.trainable(RUNS)
        else:
            memory = nullcontext() if blocks is None else host.loaded(model)
        try:
            with memory:
                planner = Planner(encoder, book, plan, on_progress=bar.stage)
                if denoiser is not None and live is not None and options.make_objective().trained:
                    takes += foretold(denoiser, model.model_size(), planner.prompts.empty, options)
                    for sentence in takes:
                        live.note(sentence, names[0], options.steps)
                job = Job(planner, denoiser or blocks, options, names, each(names))
                train_book(job, save, on_step, host.check_interrupted, lambda names: bar.next())
        except Exception as error:
            if not out_of_memory(error) or denoiser is None:
                raise
            raise SepMEError(too_large(takes, options, smaller(model, encoder, denoiser, options), host.free_memory(model))) from None
        bar.next()
        if saved(cls.hidden):
            made = list(with_thumbnails(model, clip, made, bar.show))
        bar.next()
        facts = tuple(facts_of_delta(d) for d in made)
        queued.remember(cls.hidden, facts)
        return io.NodeOutput(
            (*known, *made),
            {"loss": [loss for name in names for loss in losses[name]]},
            "\n".join([*takes, report(book, made)]),
            ui={"sepme_made": facts},
        )


def agenda(concepts: ConceptBook, erase: str, preserve: tuple[str, ...], known: Sequence[ConceptDelta]) -> tuple[ConceptBook, list[str]]:
    """The book of everything known, and the names to erase.

    Raises:
        SepMEError: a name that is not among the concepts, nothing to erase, or a concept that is erased already.
    """
    whole = {normalised(c.name) for c in concepts.concepts}  # a line that is a name is that name, commas or not
    wanted = [name for line in erase.splitlines() for name in ([line] if normalised(line) in whole else split_names(line))]
    names = [c.name for c in concepts.concepts] if wanted == ["*"] else list(dict.fromkeys(concepts[n].name for n in wanted))
    if not names:
        raise SepMEError("Nothing is to be erased; write names into 'erase', or * for all concepts.")
    erased = {normalised(d.concept.name) for d in known}
    for name in names:
        if normalised(name) in erased:
            raise SepMEError(f"There is a delta for {name!r} already; leave it out of 'erase', or out of 'deltas' to train it again.")
    new = tuple(c for c in concepts.concepts if normalised(c.name) not in erased)
    book = join(ConceptBook(tuple(d.concept for d in known)) if known else None, ConceptBook(new, concepts.preserve))
    return ConceptBook(book.concepts, tuple(dict.fromkeys(book.preserve + preserve))), names


def foretold(denoiser: host.HostDenoiser, size: int, empty: Encoding, options: TrainOptions) -> list[str]:
    """A sentence about the memory that training takes; none where it cannot be counted, which must stop nothing.

    What other extensions put into a model may look at numbers, and the tensors of a count hold none.
    """
    try:
        return [told(needed(denoiser, size, empty, options), denoiser.pixels, options)]
    except Exception as error:
        logging.getLogger(__name__).info("The memory that training takes could not be counted: %s", error)
        return []


def smaller(
    model: Any, encoder: host.ClipEncoder | host.LanguageEncoder, denoiser: host.HostDenoiser, options: TrainOptions
) -> dict[str, int]:
    """Bytes that training would take with fewer or smaller pictures, by what to choose for it, as far as they can be counted."""
    side, found = denoiser.pixels, dict[str, int]()
    few = replace(options, batch=1)
    tried = {"batch 1": (few, 0), f"size {side // 2}": (options, side // 2), f"batch 1 and size {side // 2}": (few, side // 2)}
    with torch.inference_mode(False), torch.enable_grad():
        for name, (chosen, pixels) in tried.items():
            if (pixels or chosen.batch < options.batch) and not (pixels and chosen is few and options.batch == 1):
                with suppress(SepMEError, RuntimeError):  # no model of this size, or the model is not as it was
                    smaller_model = host.denoiser_of(model, encoder, pixels) if pixels else denoiser
                    found[name] = needed(smaller_model, model.model_size(), encoder.encode([""]), chosen).total
    return found


def too_large(takes: Sequence[str], options: TrainOptions, ways: Mapping[str, int], free: int) -> str:
    """What to say when the memory ran out.

    Args:
        takes: a sentence about what training takes, if it is known.
        ways: bytes, by what to choose for it.
        free: bytes.
    """
    if not OBJECTIVES[options.objective].trained:
        return "The memory ran out; close other programs, or choose the edit context, which does not read the MODEL."
    fitting = [f"{name} (about {size_in_words(count)})" for name, count in ways.items() if count <= free]
    last = "the objective closed-form, which takes no training step"
    known = "".join(f"{sentence} " for sentence in takes)
    return f"The memory ran out. {known}{size_in_words(free)} are free; choose {' or '.join([*fitting, last])}."


def share_done(step: Progress, first: float, options: TrainOptions) -> float:
    """The share of a concept's training that is done, 0 to 1.

    It is the share of the steps. A loss that settles seldom needs them all: there it is, if that is more, how far the momentum has come
    from the first loss to the threshold.
    """
    steps = step.step / step.steps
    if not OBJECTIVES[options.objective].settles or first <= options.threshold:
        return steps
    way = (first - step.momentum) / (first - options.threshold)
    return max(steps, min(way, step.step / options.min_steps))


def report(book: ConceptBook, made: Sequence[ConceptDelta]) -> str:
    """What was made and how separable it is, a few lines a delta."""
    parts = []
    for delta in made:
        certificate, losses = delta.certificate, delta.facts.losses
        trained = f"{len(losses)} steps, loss {losses[0]:.5f} to {losses[-1]:.5f}" if losses else "closed form"
        parts.append(
            f"{delta.concept.name}: {trained}; rank {delta.rank}, {len(delta.to_bytes()) / 1000:.0f} kB\n"
            f"  leakage into known prompts {certificate.worst_leakage:.4f}, behind the gate {certificate.worst_leakage_gated:.4f}; "
            f"gate {certificate.gate_low:.3f} < {delta.gate:.3f} < {certificate.gate_high:.3f}; "
            f"touches {certificate.false_touch_rate:.1%} of ordinary prompts"
        )
    names = {d.concept.name for d in made}
    for inner, outer in book.overlaps():
        if inner in names or outer in names:
            parts.append(f"Note: the words of {inner!r} stand in {outer!r}; erasing one will touch prompts of the other.")
    return "\n".join(parts)
