"""Families of models, one data file each; every file here with a ``FAMILY`` is one (see README.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .family import CONTEXT, EMBEDDED, EPSILON, FLOW, POOLED, Family, Projection, Reading, Shapes, Text, V
from .unet import ENDS
from .unet import FAMILY as UNET

_FILES = (import_module(f".{module.name}", __name__) for module in iter_modules(__path__))
_PUBLISHED = [file.FAMILY for file in _FILES if getattr(file, "FAMILY", UNET) is not UNET]
FAMILIES: tuple[Family, ...] = (*_PUBLISHED, UNET)  # the first that recognises a model has it
_PER_LAYER = tuple(f for f in FAMILIES if f.keys_and_values)
_HOSTED = tuple(f for f in _PER_LAYER if f.direct and f.prediction != FLOW)  # hosts that train single layers have discrete timesteps
_PREFIXES = tuple(dict.fromkeys(prefix for f in FAMILIES for prefix in f.prefixes))
_OTHERS = {group for f in FAMILIES for group in f.texts} - {CONTEXT, POOLED}

__all__ = [
    "CONTEXT",
    "EMBEDDED",
    "EPSILON",
    "FAMILIES",
    "FLOW",
    "POOLED",
    "SITE",
    "Family",
    "Projection",
    "Reading",
    "Shapes",
    "Text",
    "V",
    "clip_of_width",
    "context_architecture",
    "encoder_of",
    "ends",
    "family_of",
    "find",
    "fits",
    "is_other_text",
    "is_site",
    "labels",
    "recognise",
]  # fmt: skip


def recognise(weights: Mapping[str, Sequence[int]]) -> Family | None:
    """The family of a whole model or file; None if it is none of ours.

    Args:
        weights: shapes by name, with or without ``.weight``, as single files or diffusers name them.
    """
    bare = {_bare(name.removesuffix(".weight")): shape for name, shape in weights.items()}
    if marked := next((f for f in FAMILIES if f.marked(bare)), None):
        return marked
    found = {site: bare[name] for site, name in find(bare).items()}
    return family_of({site: (shape[0], shape[1]) for site, shape in found.items()}) if found else None


def encoder_of(weights: Mapping[str, Sequence[int]]) -> str:
    """What makes the context that a whole model reads, in words; empty if it is of no known family. See :func:`recognise`."""
    family = recognise(weights)
    context = None if family is None else family.texts.get(CONTEXT)
    return "" if context is None else context.encoder


def clip_of_width(d_in: int) -> str:
    """What makes contexts of this width for UNets that read them as they are, in words; empty if none of the published ones does."""
    texts = (f.texts[CONTEXT] for f in _HOSTED if CONTEXT in f.texts)
    return next((text.encoder for text in texts if d_in in text.widths), "")


def _bare(name: str) -> str:
    return next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)


def family_of(shapes: Shapes) -> Family:
    """The family of a model with these ``(d_out, d_in)`` by site: of a published size, else of this width, else of these names."""
    named = [f for f in _PER_LAYER if all(map(f.has, shapes))]
    alike = [f for f in named if f.published(shapes)] or [f for f in named if f is not UNET and f.recognises(shapes)]
    return next(iter(alike), UNET if UNET in named or not named else named[0])


def find(names: Iterable[str]) -> dict[str, str]:
    """Sites of single layers that hosts can change, in the order of the forward pass, and the name of each among ``names``.

    See :meth:`Family.find`. Models whose layers read something else under the same names (Kolors) have none.
    """
    names = list(names)
    bare = set(map(_bare, names))
    if any(f.marked(bare) for f in FAMILIES if not f.direct):
        return {}
    return next((found for family in _HOSTED if (found := family.find(names))), {})


SITE = "middle_block.1.transformer_blocks.0.attn2.to_k"  # an example


def is_site(name: str) -> bool:
    """Whether some family has a single layer of this name that a delta may change."""
    return any(family.has(name) for family in _PER_LAYER)


def is_other_text(name: str) -> bool:
    """Whether some family is given a text of this name beside the context; ``llama.7`` is the eighth of several."""
    group, _, index = name.partition(".")
    return group in _OTHERS and (not index or (index.isdecimal() and len(index) < 4))


def context_architecture(d_in: int) -> str:
    """Architecture of deltas that edit contexts of this width and nothing else."""
    return f"{CONTEXT}-{d_in}"


def fits(architecture: str) -> str:
    """What deltas of an architecture fit, in words; edits of the context fit every model that reads contexts of their width."""
    kind, _, d_in = architecture.partition("-")
    if kind != CONTEXT or not (d_in.isdecimal() and len(d_in) < 8):
        return architecture
    known = " or ".join(f.label for f in FAMILIES if f.label and int(d_in) in {size[0] for size in f.sizes})
    return f"any {known}" if known else f"any model with a text encoder of {d_in} channels"


@cache
def ends(layer: str) -> dict[str, str]:
    """Names of a layer's modules by the last part of its sites' names; those of UNets for a layer of no known family."""
    for family in (f for f in _PER_LAYER if f.direct):
        sites = (f"{layer}.{p.site.rpartition('.')[2]}" for p in family.projections)
        paths = family.file_names(site for site in sites if family.has(site))
        if paths:
            return {site.rpartition(".")[2]: path.rpartition(".")[2] for site, path in paths.items()}
    return {end: end for end in ENDS}


def labels() -> str:
    """What people call the models whose layers hosts can change, as messages list them: ``SD1.x, SD2.x or SDXL``."""
    *most, last = [f.label for f in _HOSTED if f.label]
    return f"{', '.join(most)} or {last}"
