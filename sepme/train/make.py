"""Make deltas: plan directions, fill them by training or in closed form, certify the result. One model, one copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite
from ..concepts import Concept
from ..delta.concept_delta import ConceptDelta
from ..delta.format import PART_FACTS
from ..errors import SepMEError
from ..model.families import CONTEXT
from ..model.layers import TextBlocks, kv_fingerprint, weights
from ..model.protocols import Denoiser, Encoding, clip_skip
from ..plan.concept_tokens import own_words
from ..plan.planner import Planner, Subspace
from .compress import compress
from .increment import Increment, context_site
from .loop import Training
from .objectives.closed_form import ClosedForm
from .objectives.objective import Read
from .options import OnStep, TrainOptions
from .run import ConceptRun
from .source import Pictures, make_source

Model = Denoiser | TextBlocks | None


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
    denoiser: Model,
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
    denoiser: Model,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    pictures: Mapping[str, Pictures] | None = None,
    check: Callable[[], None] | None = None,
) -> list[ConceptDelta]:
    """Plan the concepts' directions and fill them, several concepts jointly (Eq. 3 with η).

    Args:
        planner: holds the book and its tokens.
        names: the concepts.
        denoiser: the frozen model; for closed forms its :class:`TextBlocks` will do where it has any, and None where the options need
            no model (:attr:`TrainOptions.needs_model`).
        checkpoint: where training state is stored meanwhile; training goes on from it when it is there and of the same recipe.
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
    sites, model = _sites(planner, denoiser, options)
    common = {
        "book": json.loads(planner.book.dumps()),
        "preserve_sha256": planner.prompts.preserved.digest,
        "plan": asdict(planner.options),
        "train": asdict(options),
        "threads": torch.get_num_threads(),
    } | model
    if len(names) > 1:
        common["joint"] = [p.concept.name for p in plans]
    recipes = [common | {"concept": p.concept.name} | _facts(pictures.get(n)) for n, p in zip(names, plans, strict=True)]
    blocks = denoiser if denoiser is None or isinstance(denoiser, TextBlocks) else denoiser.attention_layers()
    read = blocks.embed if isinstance(blocks, TextBlocks) and blocks.embedding else None
    increments = [_start(planner, plan, sites, options, read) for plan in plans]
    losses: list[list[float]] = [[] for _ in names]
    if options.make_objective().trained:
        assert denoiser is not None
        assert not isinstance(denoiser, TextBlocks)
        runs = [
            make_run(planner, plan.concept.name, denoiser, increment, options, pictures.get(name), check)
            for name, plan, increment in zip(names, plans, increments, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()
        Training(runs, denoiser, options).run(checkpoint, digest, on_step)
        losses = [run.losses for run in runs]
    return [_finish(planner, sites, *row, options) for row in zip(plans, increments, recipes, losses, strict=True)]


def _sites(planner: Planner, denoiser: Model, options: TrainOptions) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What an increment may change, ``(d_out, d_in)`` by site, and which model's it is."""
    kv: dict[str, Tensor] = {}
    facts: dict[str, str] = {}
    if options.needs_model:
        if denoiser is None:
            raise SepMEError("A model is needed for this training; only context edits in closed form are made without one.")
        check_layers(denoiser, options)
        layers = denoiser if isinstance(denoiser, TextBlocks) else denoiser.attention_layers()
        kv, facts = weights(layers), {"kv_fingerprint": kv_fingerprint(layers)}
        for name, weight in kv.items():
            check_finite(weight, "UNet", f"the weight of {name}")
    if options.edit == "layers":
        return kv, facts
    some = next(iter(kv.values()), torch.zeros(()))
    context = context_site(planner.prompts.empty.context.shape[-1], torch.promote_types(some.dtype, torch.float32), some.device)
    return context | (kv if options.edit == "both" else {}), facts


def check_layers(denoiser: Denoiser | TextBlocks, options: TrainOptions) -> None:
    """Refuse what the layers of a model cannot be given.

    Raises:
        SepMEError: only layers are at hand and they are to be trained; they are no UNet's and the options are for those; there are none.
    """
    objective = options.make_objective()
    if isinstance(denoiser, TextBlocks) and objective.trained:
        raise SepMEError(f"Layers of {denoiser.family.label} are trained through the whole model; give it, or choose closed-form.")
    layers = denoiser if isinstance(denoiser, TextBlocks) else denoiser.attention_layers()
    other = isinstance(layers, TextBlocks) or not layers
    if other and objective.trained and (objective.moves == "attention" or options.mode != "subspace"):
        what = f"objective {options.objective}" if objective.moves == "attention" else f"mode {options.mode}"
        raise SepMEError(f"The {what} is for Stable Diffusion; train this model by another objective, in mode subspace.")
    if options.edit != "context" and not layers:
        raise SepMEError("In this model text and picture are mixed, so no layer reads text alone; choose the edit context.")


def _facts(pictures: Pictures | None) -> dict[str, Any]:
    return {} if pictures is None else {"pictures": pictures.facts()}


def _plan(planner: Planner, name: str, options: TrainOptions) -> _Plan:
    concept = planner.book[name]
    if options.mode == "subspace":
        return _Plan(concept, subspace=planner.plan(name))
    return _Plan(concept, null=planner.null_space(name) if options.mode == "paper" else None)


def _start(planner: Planner, plan: _Plan, sites: Mapping[str, Tensor], options: TrainOptions, read: Read | None) -> Increment:
    """The increment before the first step: zero, or what an objective solves for, with which training may begin too (the closed form).

    Where the context and the layers are edited, the context takes all of the solution.
    """
    increment = Increment.zeros(sites, plan.basis, options.beta, options.values_only)
    objective = options.make_objective()
    if plan.subspace is not None and (options.warm_start or not objective.trained):
        tokens, target = planner.prompts.tokens(plan.concept.name)
        if objective.trained:
            objective = ClosedForm(options)
        solved = {CONTEXT: sites[CONTEXT]} if CONTEXT in sites else sites
        more = {"read": read} if read is not None and CONTEXT not in sites else {}
        increment.fill(objective.solve(solved, tokens, target, plan.subspace.down, **more))
    return increment


def make_run(
    planner: Planner,
    name: str,
    denoiser: Denoiser,
    increment: Increment,
    options: TrainOptions,
    pictures: Pictures | None,
    check: Callable[[], None] | None,
) -> ConceptRun:
    """A concept's run before its first step."""
    device = next(iter(increment.w.values())).device
    own = planner.prompts.encodings[name].to(device)
    repeat = own.context.shape[1] // planner.prompts.empty.context.shape[1]

    def as_long(e: Encoding) -> Encoding:
        """One row as many tokens long as the concept's prompts, which may have several chunks."""
        return Encoding(e.context.repeat(1, repeat, 1), e.mask.repeat(1, repeat), e.pooled).to(device)

    empty, anchor = as_long(planner.prompts.empty), as_long(planner.prompts.anchors[name])
    source = make_source(denoiser, own, empty, anchor, options, pictures, check)
    words = own_words(planner.prompts.encoder, planner.book[name], own.mask) if options.make_objective().reads_words else None
    return ConceptRun(name, increment, source, own, empty, anchor, options, planner.pooled(name)[0], words)


def _finish(
    planner: Planner,
    sites: Mapping[str, Tensor],
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
        subspace, up = plan.subspace, increment.up
    elif plan.null is not None:
        tokens = planner.prompts.encodings[name].context.flatten(0, 1)
        trained = {n: w.detach().cpu() for n, w in increment.w.items()}
        short = compress(trained, plan.null, tokens, options.beta, planner.options.max_rank, planner.options.energy)
        subspace, up = planner.certify(name, short.basis, plan.null.shape[1]), short.up
        facts = {"compression": short.facts}
    else:  # a full-rank ΔW has no subspace: D is the identity, and a gate of 0 lets every prompt through
        d_in = planner.prompts.empty.context.shape[-1]
        subspace = planner.certify(name, torch.eye(d_in, dtype=torch.float64), 0, gate=0.0)
        up = increment.up
    info = separable_from(planner, name) | {
        "objective": asdict(options) | {"name": options.objective, "steps": len(losses)},
        "recipe": recipe,
        "clip_skip": clip_skip(planner.prompts.encoder),
        "certificate": subspace.certificate.to_json() | ({"separable": False} if options.mode == "unrestricted" else {}),
        "losses": [round(v, 8) for v in losses],
    }
    if CONTEXT in sites:
        facts["text_encoder"] = planner.prompts.fingerprint.to_json()
    if len(sites) > (CONTEXT in sites):
        facts["kv_fingerprint"] = recipe["kv_fingerprint"]
    untrained = {n: torch.zeros(len(weight), len(subspace.down)) for n, weight in sites.items() if n not in up}
    made = ConceptDelta.from_factors(plan.concept, subspace.down, up | untrained, subspace.gate, info | facts, subspace.pooled)
    return replace(made, parts=_parts(planner, name, options)) if CONTEXT in sites else made


def _parts(planner: Planner, name: str, options: TrainOptions) -> dict[str, ConceptDelta]:
    """The edits of the other texts that the model is given, in closed form."""
    own = TrainOptions(objective="closed-form", edit="context", ridge=options.ridge)
    made = {text: make_delta(other, name, None, own) for text, other in planner.others.items()}
    return {text: replace(part, info={k: part.info[k] for k in PART_FACTS}) for text, part in made.items()}


def separable_from(planner: Planner, name: str) -> dict[str, Any]:
    """What a delta says of everything else that is known: concepts; of the preserved prompts count and digest, a short list whole."""
    prompts, nearby = planner.book.preserve, planner.prompts.nearby.found
    preserve = {"count": planner.prompts.preserved.count, "sha256": planner.prompts.preserved.digest}
    return {
        "known": [{"name": c.name, "prompts": c.prompts} for c in planner.book.concepts if c.name != name],
        "preserve": preserve | ({"prompts": prompts} if len(prompts) <= 100 else {}),
    } | ({"nearby": nearby.to_json(name)} if nearby.words else {})
