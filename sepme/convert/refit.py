"""Old responses along new directions: reprojection of deltas, and erasers of others as separable deltas (METHOD, section 6)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept, ConceptBook, normalised
from ..delta.concept_delta import ConceptDelta
from ..delta.format import PART_FACTS
from ..errors import SepMEError
from ..model.families import CONTEXT
from ..model.layers import Layers, kv_fingerprint, shapes, weights
from ..model.protocols import AttentionLayer, clip_skip
from ..plan.directions import reduce_rows
from ..plan.planner import Planner
from ..train.make import separable_from
from .foreign import Foreign, read_foreign

RETAINED = ("objective", "losses", "imported", "compression", "kv_fingerprint")  # of a delta that is reprojected


def refit(changes: Iterable[tuple[str, Tensor]], tokens: Tensor, down: Tensor) -> tuple[dict[str, Tensor], float]:
    """Y of least squares: ``min ‖C ΔW_lᵀ − C D Y_lᵀ‖`` for every projection.

    With ``H = C D`` and P the solution of ``H P = C``, ``Y_l = ΔW_l Pᵀ``.

    Args:
        changes: ΔW ``(d_out, d_in)`` by projection name, read one at a time.
        tokens: C ``(n, d_in)``.
        down: Dᵀ ``(k, d_in)``.

    Returns:
        Y ``(d_out, k)`` float32 by projection name, and what was lost: ``‖C ΔWᵀ − H Yᵀ‖ / ‖C ΔWᵀ‖`` over all projections.
    """
    c = reduce_rows(tokens.double())
    h = c @ down.double().T
    p = torch.linalg.lstsq(h, c, driver="gelsd").solution
    up, lost, whole = {}, 0.0, 0.0
    for name, change in changes:
        y = change.to("cpu", torch.float64) @ p.T
        response = c.float() @ change.to("cpu", torch.float32).T
        lost += float((response - (h @ y.T).float()).square().sum())
        whole += float(response.square().sum())
        up[name] = y.float()
    return up, (lost / whole) ** 0.5 if whole else 0.0


def response_gap(one: ConceptDelta, other: ConceptDelta, tokens: Tensor) -> float:
    """How far two deltas act differently on tokens C ``(n, d_in)``: ``‖C (ΔW − ΔW')ᵀ‖ / ‖C ΔWᵀ‖`` over all projections."""
    c = reduce_rows(tokens.double()).float()
    h, h_other = c @ one.down.T, c @ other.down.T
    gap = whole = 0.0
    for name in one.up:
        response = h @ one.up_factor(name).T
        gap += float((response - h_other @ other.up_factor(name).T).square().sum())
        whole += float(response.square().sum())
    return (gap / whole) ** 0.5 if whole else 0.0


def order_gap(delta: ConceptDelta, book: ConceptBook, planner_of: Callable[[ConceptBook], Planner], layers: Layers) -> float:
    """What is left of the order in which later concepts came: they arrive one by one in the book's order, and in reverse.

    After each arrival the delta is reprojected. In the end D is the same by construction; Y is compared by :func:`response_gap`.

    Args:
        book: everything known in the end, the delta's own concept included.
        planner_of: a planner for a part of it.
    """
    before = {c.name for c in delta.known} | {delta.concept.name}
    late = [c for c in book.concepts if c.name not in before]
    ends = []
    for arriving in (late, late[::-1]):
        step = delta
        for i in range(len(arriving)):
            known = tuple(c for c in book.concepts if c.name in before or c in arriving[: i + 1])
            planner = planner_of(replace(book, concepts=known))
            step = reproject(planner, step, layers)
        ends.append(step)
    return response_gap(ends[0], ends[1], planner.prompts.tokens(delta.concept.name)[0]) if late else 0.0


def known_to(deltas: Sequence[ConceptDelta], book: ConceptBook) -> ConceptBook:
    """Everything now known: the deltas' own concepts as stored in them, the book's, and what the deltas were made against."""
    concepts = {normalised(d.concept.name): d.concept for d in deltas}
    ordered = [concepts.pop(normalised(c.name), c) for c in book.concepts] + list(concepts.values())
    names, prompts = ({normalised(c.name) for c in ordered}, {normalised(p) for c in ordered for p in c.prompts})
    for concept in (c for d in deltas for c in d.known):
        if normalised(concept.name) not in names and not prompts & {normalised(p) for p in concept.prompts}:
            ordered.append(concept)
            names.add(normalised(concept.name))
            prompts |= {normalised(p) for p in concept.prompts}
    preserved = [p for d in deltas for p in d.preserve.prompts]
    preserve = dict.fromkeys([*book.preserve, *(p for p in preserved if normalised(p) not in prompts)])
    return replace(book, concepts=tuple(ordered), preserve=tuple(preserve))


def reproject(planner: Planner, delta: ConceptDelta, layers: Layers) -> ConceptDelta:
    """The delta along directions that spare everything the planner knows, with the old response on its own prompts refitted.

    D and the certificate then depend only on the set of known concepts, not on the order in which they came; ``info["reprojected"]``
    says what the response lost.

    Args:
        planner: of a book that holds the delta's concept (see :func:`known_to`).
        layers: the model's cross-attention; none of edits of the context alone.

    Raises:
        SepMEError: a delta for another model, or no room in the null space; an edit of a text that the planner's encoder does not make.
    """
    if layers or delta.projections:
        delta.check_fits(shapes(layers))
    for text in delta.parts:
        if text not in planner.others:
            raise SepMEError(
                f"The delta of {delta.concept.name!r} edits the text {text} too, which this text encoder does not make; train the concept "
                "anew in ComfyUI (SepME Train), where the model's encoders are."
            )
    changes = ((name, delta.weight_delta(name)) for name in delta.up)
    facts = {"from": delta.content_hash(), "rank": delta.rank}
    old = {k: v for k, v in delta.info.items() if k in RETAINED}
    recipe = {"reproject": {"from": facts["from"], "recipe": delta.recipe.data}}
    new = _delta(planner, delta.concept, changes, layers, old, "reprojected", facts, recipe)
    parts = {text: reproject(planner.others[text], replace(part, info={}), {}) for text, part in delta.parts.items()}
    return replace(new, parts={text: replace(part, info={k: part.info[k] for k in PART_FACTS}) for text, part in parts.items()})


def import_eraser(planner: Planner, name: str, path: str | Path, layers: Mapping[str, AttentionLayer]) -> ConceptDelta:
    """Somebody else's eraser as a separable delta: its ΔW on to_k and to_v projected on the concept's directions, and certified.

    Args:
        planner: of a book that holds the concept.
        name: the concept that the file erases.
        path: see :func:`read_foreign`.
        layers: cross-attention of the model that the file was made from.

    Raises:
        SepMEError: see :func:`read_foreign`; no room in the null space.
    """
    foreign = read_foreign(path, weights(layers))
    facts = {"file": Path(path).name, "sha256": _digest(foreign), "kind": foreign.kind, "other_tensors": foreign.others}
    if foreign.kind == "lora":
        facts["own_scale"] = foreign.alpha
    info = {"objective": {"name": "imported", "steps": 0}, "losses": []}
    recipe = {"import": facts["sha256"]}
    return _delta(planner, planner.book[name], foreign, layers, info, "imported", facts, recipe)


def _digest(foreign: Foreign) -> str:
    digest = hashlib.sha256()
    for name, change in foreign:
        digest.update(name.encode() + change.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _delta(
    planner: Planner,
    concept: Concept,
    changes: Iterable[tuple[str, Tensor]],
    layers: Layers,
    info: dict[str, Any],
    what: str,
    facts: dict[str, Any],
    recipe: dict[str, Any],
) -> ConceptDelta:
    subspace = planner.plan(concept.name)
    up, loss = refit(changes, planner.prompts.tokens(concept.name)[0], subspace.down)
    made_with: dict[str, Any] = {"clip_skip": clip_skip(planner.prompts.encoder)}
    if set(up) - {CONTEXT}:
        up |= {n: torch.zeros(s[0], len(subspace.down)) for n, s in shapes(layers).items() if n not in up}
        made_with["kv_fingerprint"] = kv_fingerprint(layers)
    if CONTEXT in up:
        made_with["text_encoder"] = planner.prompts.fingerprint.to_json()
    own = {
        what: facts | {"response_loss": loss},
        "recipe": recipe | {"book": json.loads(planner.book.dumps()), "plan": asdict(planner.options), "concept": concept.name},
        "certificate": subspace.certificate.to_json(),
    }
    info = made_with | info | separable_from(planner, concept.name) | own
    return ConceptDelta.from_factors(concept, subspace.down, up, subspace.gate, info, subspace.pooled)
