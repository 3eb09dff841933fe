"""Deltas as one LoRA file in kohya's layout, for tools that know nothing of SepME."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..apply.composition import Composition
from ..apply.toggles import Toggles
from ..apply.toggles import strengths as table
from ..delta.concept_delta import ConceptDelta
from ..delta.format import check_replaceable
from ..errors import SepMEError
from ..files import safetensors_bytes, write_atomically
from ..model.families import CONTEXT, family_of

GATE_OFF = "off: a LoRA acts on every prompt, so what the gate keeps bit-identical changes by the linear leakage"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def export_lora(
    deltas: Sequence[ConceptDelta],
    path: str | Path,
    strengths: Toggles | None = None,
    dtype: torch.dtype = torch.float16,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``ΔW = Σ_i s_i Y_i D_iᵀ`` as a LoRA of rank ``Σ k_i``: ``lora_down`` = the D side by side, ``lora_up`` = the ``s_i Y_i``.

    An edit of the context ``(c D) Sᵀ`` becomes ``Y = W S`` of one model's weights. The gate is off in a LoRA and SDXL's pooled part has no
    place in it; the file's metadata says so.

    Args:
        deltas: of one architecture.
        strengths: by concept, 1 where not given; concepts at 0 are left out.
        dtype: of the tensors: float16, bfloat16 or float32.
        weights: W ``(d_out, d_in)`` by projection name of the model that the LoRA is
            for (:func:`~.checkpoint.model_weights`); needed where a delta edits the context.

    Raises:
        SepMEError: no deltas, two of one concept or for different models, an unknown concept or precision, no weights where they are
            needed or those of another model, a place that is a delta's own or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise SepMEError(f"{path} is no name for a LoRA; end it in .safetensors.")
    check_replaceable(path, inputs=[Path(d.file) for d in deltas if d.file])
    return write_atomically(path, safetensors_bytes(*lora(deltas, strengths, dtype, weights)))


def lora(
    deltas: Sequence[ConceptDelta],
    strengths: Toggles | None = None,
    dtype: torch.dtype = torch.float16,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the LoRA of several deltas; arguments as for :func:`export_lora`."""
    if dtype not in DTYPES:
        raise SepMEError(f"A LoRA cannot be written as {dtype}; choose float16, bfloat16 or float32.")
    chosen = weighed(deltas, strengths)
    shapes = _shapes(chosen, weights)
    tensors: dict[str, Tensor] = {}
    for name, key in family_of(shapes).kohya_names(shapes).items():
        pairs = [_balanced(s * whole_factor(d, name, (weights or {}).get(name)), d.down) for d, s in chosen]
        if any(up.any() for up, _ in pairs):  # values-only deltas leave to_k as it is
            up, down = (torch.cat(side, dim=axis) for side, axis in zip(zip(*pairs, strict=True), (1, 0), strict=True))
            tensors[f"{key}.lora_up.weight"] = up.to(dtype).contiguous()
            tensors[f"{key}.lora_down.weight"] = down.to(dtype).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))  # loaders scale by alpha / rank, 1 here
    if not tensors:
        raise SepMEError("These deltas change nothing; there is nothing to export.")
    return tensors, _metadata(chosen, shapes)


def _shapes(chosen: Sequence[tuple[ConceptDelta, float]], weights: Mapping[str, Tensor] | None) -> Mapping[str, tuple[int, int]]:
    """Of the projections that are written."""
    first = next((d for d, _ in chosen if d.edits_context), None)
    if first is None:
        return chosen[0][0].shapes
    if weights is None:
        raise SepMEError(
            f"The delta of {first.concept.name!r} edits the context; as a LoRA it depends on a model's weights, so name the model that the "
            "LoRA is for (sepme export --model)."
        )
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    for delta, _ in chosen:
        delta.check_fits(shapes)
    return shapes


def whole_factor(delta: ConceptDelta, name: str, weight: Tensor | None) -> Tensor:
    """``Y_l + W_l S`` ``(d_out, k)`` float32: of a projection, the delta's edit of the context through its weight included."""
    own = delta.up_factor(name) if name in delta.up else 0
    if not delta.edits_context or weight is None:
        assert isinstance(own, Tensor)
        return own
    return own + weight.to("cpu", torch.float32) @ delta.up_factor(CONTEXT)


def weighed(deltas: Sequence[ConceptDelta], strengths: Toggles | None) -> list[tuple[ConceptDelta, float]]:
    """Deltas and their strengths, without those at 0.

    Raises:
        SepMEError: nothing is left, two deltas of one concept or for different models, an unknown concept; layers behind an embedding.
    """
    composition = Composition(tuple(deltas))
    for delta in deltas:
        if delta.projections and not family_of(delta.shapes).direct:
            raise SepMEError(
                f"The delta of {delta.concept.name!r} changes layers that read an embedding of the text, and no change of weights does "
                "the same; export a delta that edits the context."
            )
    chosen = [(d, s) for d, s in zip(deltas, table([strengths or {}], composition.deltas)[0].tolist(), strict=True) if s != 0]
    if not chosen:
        raise SepMEError("Nothing is left to export; give at least one delta whose strength is not 0.")
    return chosen


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of like size, so that neither sinks into half precision's subnormals; by powers of two: exact."""
    sizes = float(up.abs().max()), float(down.abs().max())
    if not all(sizes):
        return up, down
    half = round(math.log2(sizes[1] / sizes[0]) / 2)
    return up * 2.0**half, down * 2.0**-half


def _metadata(chosen: Sequence[tuple[ConceptDelta, float]], shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    rank = sum(d.rank for d, _ in chosen)
    family = family_of(shapes)
    published = family.published(shapes)
    names = ", ".join(d.concept.name for d, _ in chosen)
    facts = {
        "sepme.concepts": json.dumps([{"name": d.concept.name, "strength": s, "content_hash": d.content_hash()} for d, s in chosen]),
        "sepme.gate": GATE_OFF,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.modelspec if published else family.architecture(shapes)}/lora",
        "modelspec.title": f"SepME: {names}",
        "modelspec.description": f"Erases {names}. The row gate is off in a LoRA; SepME's own files have it.",
    }
    if any(d.pooled is not None for d, _ in chosen):
        facts["sepme.pooled"] = "left out: a LoRA cannot replace the pooled text vector"
    return {**facts, **(family.lora_facts if published else {})}
