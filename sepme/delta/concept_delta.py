"""One concept's delta: what it adds along its directions D, its gate and certificate, as one safetensors file.

It edits the context, ``c + (c D) Sᵀ``, or every to_k and to_v, ``ΔW_l = Y_l Dᵀ``, or both; the sum acts.

Tensors: ``down`` (k, d_in) float32; ``up.context`` (d_in, k) and ``up.<layer>.to_k`` / ``.to_v`` (d_out, k) float16, each with a
float32 scalar ``<name>.scale``; for models with a pooled text vector optionally both ``pooled.down`` (k', d_pooled) and
``pooled.anchor`` (k',), float32; for models that are given other texts beside the context ``down.<text>``, ``up.<text>`` and its scale, as
of a context edit, their gates and certificates in the header's ``parts``; of a guard ``guard.*`` float32 (``plan/guard.py``), its threshold
in the header. Everything else is header metadata (strings, JSON inside). No dates: one recipe, one sequence of bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..concepts import Concept, normalised
from ..errors import SepMEError, out_of_memory
from ..files import first_line, number, safetensors_bytes, write_atomically
from ..model.families import CONTEXT, SITE, context_architecture, fits, is_site
from ..model.layers import architecture
from ..plan.gate import Certificate, ratios
from ..plan.guard import Guard
from ..plan.pooled import Pooled
from .facts import DAMAGE, Facts, Preserve, Recipe
from .format import FORMAT, GUARD, MAX_GATE, OWN, PART_FACTS, POOLED, check_declared, header_hash, parts_declared, plain_json, read_header
from .thumbnail import KEY as THUMBNAIL
from .thumbnail import picture

DESCRIPTIONS = {  # by whether the context and whether projections are edited
    (False, True): "A separable concept erasure for cross-attention to_k and to_v.",
    (True, False): "A separable concept erasure for the text encoder's context.",
    (True, True): "A separable concept erasure for the text encoder's context and for cross-attention to_k and to_v.",
}


@dataclass(frozen=True)
class ConceptDelta:
    """An immutable delta; it neither holds nor needs a model.

    Attributes:
        concept: what it erases.
        down: ``(k, d_in)`` float32, orthonormal rows.
        up: ``(d_out, k)`` float16 by projection name (``<layer>.to_k``), Y once multiplied by ``scale`` of the same name; and of a
            context edit S ``(d_in, k)`` under the name ``context``.
        gate: γ of the row gate.
        info: JSON-able, what else stands in the header; :attr:`facts` is what it means.
        pooled: what replaces the concept in the pooled vector, or None: the vector is left as it is.
        parts: edits of the other texts that the model is given beside the context, by name (``t5``; ``llama.7``: the eighth of several),
            each with directions and a gate of its own.
        guard: a second gate, and what stands behind it, or None.
        file: path that it was read from, with forward slashes; empty if from no file.
        thumbnail: data URL of a small picture; empty if there is none.
    """

    concept: Concept
    down: Tensor
    up: Mapping[str, Tensor]
    scale: Mapping[str, float]
    gate: float
    info: Mapping[str, Any] = field(default_factory=dict)
    pooled: Pooled | None = None
    parts: Mapping[str, ConceptDelta] = field(default_factory=dict)
    guard: Guard | None = None
    file: str = field(default="", compare=False)
    thumbnail: str = field(default="", compare=False)

    @staticmethod
    def from_factors(
        concept: Concept,
        down: Tensor,
        up: Mapping[str, Tensor],
        gate: float,
        info: Mapping[str, Any],
        pooled: Pooled | None = None,
    ) -> ConceptDelta:
        """Round float factors Y (``(d_out, k)`` by projection name, β folded in) to what a file holds.

        Raises:
            SepMEError: NaN or infinite values.
        """
        halves, scales = {}, {}
        for name, value in sorted(up.items()):
            value = value.detach().to("cpu", torch.float32)
            scale = float(value.abs().max()) if value.numel() else 0.0
            if not math.isfinite(scale) or not value.isfinite().all():
                raise SepMEError(f"The delta of {concept.name!r} became NaN or infinite at {name}; lower the learning rate.")
            scale = float(torch.tensor(scale or 1.0, dtype=torch.float32))
            halves[name], scales[name] = (value / scale).half().contiguous(), scale
        down = down.detach().to("cpu", torch.float32).contiguous()
        return ConceptDelta(concept, down, halves, scales, float(gate), dict(info), pooled)

    @property
    def rank(self) -> int:
        """k, the number of directions."""
        return self.down.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the context."""
        return self.down.shape[1]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """``(d_out, d_in)`` by projection name, of the per-layer part."""
        return {name: (self.up[name].shape[0], self.d_in) for name in self.projections}

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections that it changes, in the one order that all deltas of an architecture have."""
        return tuple(sorted(name for name in self.up if name != CONTEXT))

    @property
    def edits_context(self) -> bool:
        """Whether it changes the context itself."""
        return CONTEXT in self.up

    @cached_property
    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Yᵀ of all projections in that order, ``(k, Σ d_out)`` float16, and what each column is to be multiplied by, float32."""
        scales = [torch.full((len(self.up[n]),), self.scale[n]) for n in self.projections]
        return torch.cat([self.up[n].T for n in self.projections], dim=1), torch.cat(scales)

    @cached_property
    def facts(self) -> Facts:
        """How it was made and what was measured."""
        return Facts.from_info(self.info)

    @property
    def certificate(self) -> Certificate:
        """What was measured of the subspace and the gate."""
        return self.facts.certificate

    @property
    def grade(self) -> str:
        """The certificate in one word: good, fair, poor or unknown."""
        return self.certificate.grade(self.gate)

    @property
    def verdict(self) -> str:
        """The certificate in a sentence."""
        return self.certificate.verdict(self.gate)

    @property
    def known(self) -> tuple[Concept, ...]:
        """The other concepts that it was made to leave alone."""
        return self.facts.known

    @property
    def preserve(self) -> Preserve:
        """The prompts that it was made to leave alone."""
        return self.facts.preserve

    @property
    def recipe(self) -> Recipe:
        """How to make it again."""
        return self.facts.recipe

    @cached_property
    def architecture(self) -> str:
        """Of the models that it fits; a pure context edit fits every model that reads contexts of this width from its text encoder."""
        return architecture(self.shapes) if self.projections else context_architecture(self.d_in)

    @property
    def edits(self) -> str:
        """What it edits and which models it fits, in words."""
        if not self.projections:
            made = self.facts.text_encoder
            encoder = made.name if made is not None and made.name else "this text encoder"
            return f"edits the context: fits any model with {encoder} ({fits(self.architecture)})"
        both = "the context and " if self.edits_context else ""
        return f"edits {both}{len(self.projections)} text projections: fits {self.architecture}"

    def statistic(self, context: Tensor) -> Tensor:
        """What the gate compares with its threshold ``(rows,)`` float32, of contexts ``(rows, tokens, d_in)``; with a guard that opens
        further, how far that is opened times the threshold."""
        own = ratios(context, self.down)
        return own if self.guard is None else torch.maximum(own, self.gate * self.guard.openness(context))

    def up_factor(self, name: str) -> Tensor:
        """Y ``(d_out, k)`` float32 of a projection."""
        return self.up[name].float() * self.scale[name]

    def weight_delta(self, name: str) -> Tensor:
        """ΔW ``(d_out, d_in)`` float32 of a projection."""
        return self.up_factor(name) @ self.down

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, by name."""
        tensors = {"down": self.down}
        if self.pooled is not None:
            tensors |= {POOLED[0]: self.pooled.down, POOLED[1]: self.pooled.anchor}
        for text, part in self.parts.items():
            tensors |= {
                name.replace(f"up.{CONTEXT}", "up").replace("up", f"up.{text}").replace("down", f"down.{text}"): t
                for name, t in part.tensors().items()
            }
        if self.guard is not None:
            tensors |= self.guard.tensors()
        for name in self.up:
            tensors[f"up.{name}"] = self.up[name]
            tensors[f"up.{name}.scale"] = torch.tensor(self.scale[name], dtype=torch.float32)
        return dict(sorted(tensors.items()))

    def content_hash(self) -> str:
        """SHA-256 of names, shapes, types and bytes of the tensors."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], what: str = "the model") -> None:
        """Raise :class:`SepMEError` unless this delta is for a model with these K/V shapes."""
        widths = {d_in for _, d_in in shapes.values()}
        if not self.projections and self.d_in not in widths:
            raise SepMEError(
                f"The delta of {self.concept.name!r} edits contexts of {self.d_in} channels, but {what} reads "
                f"{' and '.join(map(str, sorted(widths)))}; train the concept with this model's text encoder."
            )
        if self.projections and shapes != self.shapes:
            raise SepMEError(
                f"The delta of {self.concept.name!r} is for {self.architecture} (d_in {self.d_in}, {len(self.projections)} projections), "
                f"but {what} is {architecture(shapes)}; train the concept on this model, or load the checkpoint it was made for."
            )

    def metadata(self) -> dict[str, str]:
        """The file's header, without its content hash."""
        texts = {
            "format": FORMAT,
            "concept": self.concept.name,
            "prompts": json.dumps(self.concept.prompts),
            "anchor": self.concept.anchor,
            "architecture": self.architecture,
            "gate": repr(self.gate),
            "content_hash": self.content_hash(),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.architecture}/sepme-delta",
            "modelspec.title": f"SepME: {self.concept.name}",
            "modelspec.description": DESCRIPTIONS[self.edits_context, bool(self.projections)],
        } | ({THUMBNAIL: self.thumbnail} if self.thumbnail else {})
        if self.parts:
            parts = {
                text: {"gate": part.gate} | {k: part.info[k] for k in PART_FACTS if k in part.info} for text, part in self.parts.items()
            }
            texts["parts"] = json.dumps(parts, sort_keys=True)
        if self.guard is not None:
            texts["guard_threshold"] = repr(self.guard.threshold)
        texts |= {key: json.dumps(value, sort_keys=True) for key, value in self.info.items()}
        return texts | {"header_hash": header_hash(texts)}

    def to_bytes(self) -> bytes:
        """The file."""
        return safetensors_bytes(self.tensors(), self.metadata())

    def save(self, path: str | Path) -> Path:
        """Write the file: temporary file in the same folder, fsync, rename.

        Raises:
            SepMEError: the folder cannot be written or the disk is full; nothing is left behind. Or an attention layer has a name that
                no file holds: a model of one's own names them as LDM does.
        """
        for name in self.up:
            if name != CONTEXT and not is_site(name):
                raise SepMEError(f"A file holds layers under LDM's names, as {SITE}; {name[:60]!r} is none, rename the model's layers.")
        return write_atomically(path, self.to_bytes())

    @staticmethod
    def load(path: str | Path) -> ConceptDelta:
        """Read and check a file.

        Raises:
            SepMEError: missing, too large, no safetensors, another format, missing or foreign tensors, wrong shapes or
                types, NaN; the message names file and field.
        """
        path = Path(path)
        metadata, declared = read_header(path)
        check_declared(path, declared)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in sorted(declared)}  # not mapped: the file may change
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise SepMEError(f"{path} is damaged ({first_line(error)}); get it again.") from None
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise SepMEError(f"{path}: tensor {name!r} holds NaN or infinite values; train it again.")
        return _assemble(path, metadata, tensors)


def _assemble(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> ConceptDelta:
    try:
        prompts = json.loads(metadata["prompts"])
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError("prompts")
        concept = Concept(metadata["concept"], tuple(prompts), metadata.get("anchor", ""))
        gate = float(metadata["gate"])
        info = {k: plain_json(v) for k, v in metadata.items() if k not in OWN and not k.startswith("modelspec.")}
        Facts.from_info(info)
        parts = _read_parts(concept, plain_json(metadata.get("parts", "{}")), tensors)
        guard = _read_guard(metadata, tensors)
    except DAMAGE as error:
        raise SepMEError(f"{path}: its metadata is damaged ({first_line(error)}); get the file again.") from None
    tensors = {name: t for name, t in tensors.items() if not any(name in _names(text) for text in parts)}
    if not 0 <= gate <= MAX_GATE:
        raise SepMEError(f"{path}: its gate {gate} is no threshold; the file is damaged.")
    up = {k[3:]: v for k, v in tensors.items() if k.startswith("up.") and not k.endswith(".scale")}
    scale = {k: float(tensors[f"up.{k}.scale"]) for k in up}
    for name, value in up.items():
        if not (value.float() * scale[name]).isfinite().all():
            raise SepMEError(f"{path}: tensor 'up.{name}' times its scale is infinite; the file is damaged.")
    pooled = Pooled(tensors[POOLED[0]], tensors[POOLED[1]]) if POOLED[0] in tensors else None
    thumbnail = metadata.get(THUMBNAIL, "")
    shown = thumbnail if picture(thumbnail) else ""
    delta = ConceptDelta(concept, tensors["down"], up, scale, gate, info, pooled, parts, guard, path.as_posix(), shown)
    if metadata.get("content_hash") != delta.content_hash() or metadata.get("header_hash") != header_hash(metadata):
        raise SepMEError(f"{path}: its content does not match its hash; the file was damaged or changed, get it again.")
    return delta


def _read_guard(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Guard | None:
    if GUARD[0] not in tensors:
        return None
    threshold = number(plain_json(metadata["guard_threshold"]))
    return Guard(threshold=threshold, **{name.removeprefix("guard."): tensors[name] for name in GUARD})


def _names(text: str) -> tuple[str, str, str]:
    """Names of a part's tensors in the file: D, S and the scale of S."""
    return f"down.{text}", f"up.{text}", f"up.{text}.scale"


def _read_parts(concept: Concept, facts: Any, tensors: Mapping[str, Tensor]) -> dict[str, ConceptDelta]:
    """The edits of other texts; ``facts`` by text."""
    parts = {}
    for text in parts_declared(tensors):
        down, up, scale = _names(text)
        info, gate = {k: facts[text][k] for k in PART_FACTS if k in facts[text]}, float(facts[text]["gate"])
        Facts.from_info(info)
        if not 0 <= gate <= MAX_GATE or not (tensors[up].float() * tensors[scale]).isfinite().all():
            raise ValueError(text)
        parts[text] = ConceptDelta(concept, tensors[down], {CONTEXT: tensors[up]}, {CONTEXT: float(tensors[scale])}, gate, info)
    return parts


def check_apart(deltas: Sequence[ConceptDelta]) -> None:
    """Raise :class:`SepMEError` if two deltas are of one concept."""
    seen: set[str] = set()
    for delta in deltas:
        if normalised(delta.concept.name) in seen:
            raise SepMEError(f"Two deltas erase {delta.concept.name!r}; load one of them.")
        seen.add(normalised(delta.concept.name))
