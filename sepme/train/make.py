"""Make deltas: plan directions, fill them by training or in closed form, certify the result. One model, one copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite
from ..concepts import Concept
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..model.layers import kv_fingerprint, weights
from ..model.protocols import Denoiser, Encoding, clip_skip
from ..plan.concept_tokens import own_words
from ..plan.planner import Planner, Subspace
from .compress import compress
from .increment import Increment
from .loop import Track, Training
from .objectives import OBJECTIVES
from .objectives.closed_form import solve
from .options import OnStep, TrainOptions
from .source import Pictures, make_source


class _Plan(NamedTuple):
    """Directions of one concept before training: its subspace (mode subspace) or Sp ``(d_in, m)`` (mode paper)."""

    concept: Concept
    subspace: Subspace | None = None
    null: Tensor | None = None

    @property
    def basis(self) -> Tensor | None:
        """Rows along which w acts ``(m, d_in)``; None: no restriction."""
        if self.subspace is not None:
            return self.subspace.down
        return None if self.null is None else self.null.T.contiguous()


def make_delta(
    planner: Planner,
    name: str,
    denoiser: Denoiser,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    pictures: Pictures | None = None,
    check: Callable[[], None] | None = None,
) -> ConceptDelta:
    """Make the delta of one concept, trained by itself; see :func:`make_deltas`."""
    given = None if pictures is None else {name: pictures}
    return make_deltas(planner, [name], denoiser, options, checkpoint, on_step, given, check)[0]


def make_deltas(
    planner: Planner,
    names: Sequence[str],
    denoiser: Denoiser,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    pictures: Mapping[str, Pictures] | None = None,
    check: Callable[[], None] | None = None,
) -> list[ConceptDelta]:
    """Plan the concepts' directions and fill them, several concepts jointly (Eq. 3 with η).

    Args:
        planner: holds the book and its tokens. names: the concepts. denoiser: the frozen model.
        checkpoint: where training state is kept meanwhile; training goes on from it when it is there and of the same recipe.
            The caller deletes it once the deltas are saved.
        on_step: called after every step; it may raise :class:`~sepme.errors.Interrupted`, which stops training after a checkpoint.
        pictures: by concept, the user's pictures of which x_t is made.
        check: called between denoising steps while the frozen model draws what x_t is made of; it may raise Interrupted too.

    Returns:
        the deltas in the order of ``names``, each with certificate, recipe and ``losses`` in its info.

    Raises:
        SepMEError: no room in the null space, training diverged, or joint training in mode unrestricted.
        Interrupted: raised by ``on_step`` or ``check``.
    """
    options, pictures = options or TrainOptions(), pictures or {}
    if options.mode == "unrestricted" and len(names) > 1:
        raise SepMEError("Unrestricted increments mix their gradients, so they cannot be trained jointly; train them one by one.")
    plans = [_plan(planner, name, options) for name in names]
    layers = denoiser.attention_layers()
    kv = weights(layers)
    for name, weight in kv.items():
        check_finite(weight, "UNet", f"the weight of {name}")
    common = {
        "book": json.loads(planner.book.dumps()),
        "preserve_sha256": planner.prompts.preserved.digest,
        "plan": asdict(planner.options),
        "train": asdict(options),
        "kv_fingerprint": kv_fingerprint(layers),
        "threads": torch.get_num_threads(),
    }
    if len(names) > 1:
        common["joint"] = [p.concept.name for p in plans]
    recipes = [common | {"concept": p.concept.name} | _facts(pictures.get(n)) for n, p in zip(names, plans, strict=True)]
    increments = [_start(planner, plan, kv, options) for plan in plans]
    losses: list[list[float]] = [[] for _ in names]
    if options.objective != "closed-form":
        tracks = []
        for name, plan, increment in zip(names, plans, increments, strict=True):
            tracks.append(make_track(planner, plan.concept.name, denoiser, increment, options, pictures.get(name), check))
        digest = hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()
        Training(tracks, denoiser, options).run(checkpoint, digest, on_step)
        losses = [t.losses for t in tracks]
    return [_finish(planner, kv, *row, options) for row in zip(plans, increments, recipes, losses, strict=True)]


def _facts(pictures: Pictures | None) -> dict[str, Any]:
    return {} if pictures is None else {"pictures": pictures.facts()}


def _plan(planner: Planner, name: str, options: TrainOptions) -> _Plan:
    concept = planner.book[name]
    if options.mode == "subspace":
        return _Plan(concept, subspace=planner.plan(name))
    return _Plan(concept, null=planner.null_space(name) if options.mode == "paper" else None)


def _start(planner: Planner, plan: _Plan, kv: Mapping[str, Tensor], options: TrainOptions) -> Increment:
    """The increment before the first step: zero, or the closed form (which the objective closed-form keeps)."""
    increment = Increment.zeros(kv, plan.basis, options.beta, options.values_only)
    if plan.subspace is not None and (options.warm_start or options.objective == "closed-form"):
        tokens, target = planner.prompts.tokens(plan.concept.name)
        up = solve(kv, tokens, target, plan.subspace.down, options.ridge, options.values_only)
        for name, w in increment.w.items():
            w.data.copy_(up[name] / options.beta)
    return increment


def make_track(
    planner: Planner,
    name: str,
    denoiser: Denoiser,
    increment: Increment,
    options: TrainOptions,
    pictures: Pictures | None,
    check: Callable[[], None] | None,
) -> Track:
    """A concept's track before its first step."""
    device = next(iter(increment.w.values())).device
    own, empty = planner.prompts.encodings[name].to(device), planner.prompts.empty
    repeat = own.context.shape[1] // empty.context.shape[1]
    nothing = Encoding(empty.context.repeat(1, repeat, 1), empty.mask.repeat(1, repeat), empty.pooled).to(device)
    anchor = planner.prompts.anchors[name]
    anchor = Encoding(anchor.context.repeat(1, repeat, 1), anchor.mask.repeat(1, repeat), anchor.pooled).to(device)
    source = make_source(denoiser, own, nothing, anchor, options, pictures, check)
    words = own_words(planner.prompts.encoder, planner.book[name], own.mask) if OBJECTIVES[options.objective](options).reads_words else None
    return Track.start(name, increment, source, own, nothing, options, anchor=anchor, words=words, pooled=planner.pooled(name)[0])


def _finish(
    planner: Planner,
    kv: Mapping[str, Tensor],
    plan: _Plan,
    increment: Increment,
    recipe: dict[str, Any],
    losses: list[float],
    options: TrainOptions,
) -> ConceptDelta:
    """The delta file of a trained increment, in every mode ``ΔW_l = Y_l Dᵀ``."""
    name = plan.concept.name
    facts: dict[str, Any] = {}
    if plan.subspace is not None:
        subspace, up = plan.subspace, {n: options.beta * w.detach().cpu() for n, w in increment.w.items()}
    elif plan.null is not None:
        tokens = planner.prompts.encodings[name].context.flatten(0, 1)
        trained = {n: w.detach().cpu() for n, w in increment.w.items()}
        short = compress(trained, plan.null, tokens, options.beta, planner.options.max_rank, planner.options.energy)
        subspace, up = planner.certify(name, short.basis, plan.null.shape[1]), short.up
        facts = {"compression": short.facts}
    else:  # a full-rank ΔW has no subspace: D is the identity, and a gate of 0 lets every prompt through
        d_in = planner.prompts.empty.context.shape[-1]
        subspace = planner.certify(name, torch.eye(d_in, dtype=torch.float64), 0, gate=0.0)
        up = {n: options.beta * w.detach().cpu() for n, w in increment.w.items()}
    info = separable_from(planner, name) | {
        "objective": asdict(options) | {"name": options.objective, "steps": len(losses)},
        "recipe": recipe,
        "kv_fingerprint": recipe["kv_fingerprint"],
        "clip_skip": clip_skip(planner.prompts.encoder),
        "certificate": subspace.certificate.to_json() | ({"separable": False} if options.mode == "unrestricted" else {}),
        "losses": [round(v, 8) for v in losses],
    }
    untrained = {n: torch.zeros(len(weight), len(subspace.down)) for n, weight in kv.items() if n not in up}
    return ConceptDelta.from_factors(plan.concept, subspace.down, up | untrained, subspace.gate, info | facts, subspace.pooled)


def separable_from(planner: Planner, name: str) -> dict[str, Any]:
    """What a delta says of everything else that is known: concepts; of the preserved prompts count and digest, a short list whole."""
    prompts = planner.book.preserve
    preserve = {"count": planner.prompts.preserved.count, "sha256": planner.prompts.preserved.digest}
    return {
        "known": [{"name": c.name, "prompts": c.prompts} for c in planner.book.concepts if c.name != name],
        "preserve": preserve | ({"prompts": prompts} if len(prompts) <= 100 else {}),
    }
