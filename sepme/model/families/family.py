"""What a family of models is to SepME: which of its linear layers read text, and what other programs call them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

Shapes = Mapping[str, tuple[int, int]]
CONTEXT, POOLED, EMBEDDED = "context", "pooled", "embedded"
EPSILON, V, FLOW = "epsilon", "v", "flow"


@dataclass(frozen=True)
class Reading:
    """How one encoder that is no CLIP makes a text of a prompt.

    Attributes:
        model: what the transformers library calls the encoder's architecture: ``t5``, ``qwen3`` ...
        states: which of its states count: 0 those of the embeddings, -1 the last ones, normalised; several lie side by side.
        template: what the prompt stands in, in place of ``{}``.
        cut: whether the states of what stands before the prompt are left out.
        least: tokens at least; shorter prompts are filled up with ``pad``.
        hidden: whether encoder and denoiser are kept from reading what fills them up.
    """

    model: str
    states: tuple[int, ...] = (-1,)
    template: str = "{}"
    cut: bool = False
    least: int = 1
    pad: int = 0
    hidden: bool = False


@dataclass(frozen=True)
class Text:
    """A text that the denoiser is given.

    Attributes:
        encoder: what makes it, in words.
        widths: channels of the published models.
        tokens: how many of them, in words; empty for one vector a prompt.
        reading: how it is made, where one encoder makes it alone and the denoiser is given what it makes.
    """

    encoder: str
    widths: tuple[int, ...]
    tokens: str = ""
    reading: Reading | None = None


@dataclass(frozen=True)
class Projection:
    """Linear layers that read text and nothing else. In the names ``*`` stands for a number, in all of them the same numbers.

    Attributes:
        site: name in delta files and everywhere in SepME.
        path: module in single files and in ComfyUI's and Automatic1111's models; the same as ``site`` if empty.
        diffusers: module in diffusers' models; the same as ``path`` if empty.
        group: the text input that it reads: the context, or the name of another one (a pooled vector, a second encoder), or
            ``embedded``: what the model itself has made of them. Layers of other groups have names, but are no part of the edit of
            the context.
        bias: whether it adds one.
        lora: whether a change of its weight, and of the others that read the text, can equal an edit of the text: not where the text
            is normalised in front of it or is read by more than linear layers.
        fused: what the rows of ``path`` hold one below the other, ``kv`` or ``qkv``; this layer's are those of the site's last letter.
            Keys and values have equally many. Empty: the whole module is this layer.
    """

    site: str
    path: str = ""
    diffusers: str = ""
    group: str = CONTEXT
    bias: bool = False
    lora: bool = True
    fused: str = ""

    @property
    def keys_or_values(self) -> bool:
        """Whether it is an ordinary ``to_k`` or ``to_v``."""
        return self.site.endswith((".to_k", ".to_v"))

    def template(self, naming: str) -> str:
        """The name in a naming: ``site``, ``path`` or ``diffusers``."""
        return (self.diffusers if naming == "diffusers" else "") or (self.path if naming != "site" else "") or self.site

    def numbers(self, naming: str, name: str) -> tuple[str, ...] | None:
        """The numbers that stand in a name for the stars; None if it is the name of something else."""
        match = _pattern(self.template(naming)).fullmatch(name)
        return match.groups() if match else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*", r"(\d+)"))


@cache
def _any(projections: tuple[Projection, ...], naming: str) -> re.Pattern[str]:
    """All their names in a naming at once: whole checkpoints have thousands of names that are none of them."""
    return re.compile("|".join(_pattern(p.template(naming)).pattern for p in projections))


@dataclass(frozen=True, eq=False)
class Family:
    """Models that read text in the same places.

    Attributes:
        kind: begins the names of architectures that ``sizes`` does not hold.
        projections: in the order of the forward pass; the first whose name a layer has is the layer's.
        label: what people call the models; messages list it.
        texts: what the denoiser is given, by group.
        prediction: ``epsilon``, ``v`` or ``flow``, as most models of the family; a checkpoint may differ where its host says so.
        cross_attention: whether keys and values are made of text alone, the same in every step, so that deltas of single layers are
            exact. Otherwise text is mixed with the picture, and only the context (or the layer that reads it) can be edited.
        marks: names of weights (without ``.weight``, as in single files or in diffusers) that tell the family from all others: every
            word of one of them must be there, none that begins with ``-``. Families without are told by ``sizes``.
        embedding: modules that make of the context what keys and values read, one after the other, in single files and in diffusers.
        cannot: what a delta cannot do here, as a sentence; empty if nothing is known.
        sizes: name of the published architecture by d_in and number of projections. A model belongs to the family if its sites have
            names of ``projections`` and its d_in is one of these; empty: any d_in.
        side: latents along one side of an image of the usual size; 0: as the model says.
        prefixes: before module names in single files; the first is that of whole checkpoints.
        kohya: a layer's name in a LoRA file, with ``{diffusers}`` or ``{path}`` in it; its dots become underscores.
        lora_facts: metadata by which other programs sort LoRA files of the published sizes.
        modelspec: name of the published sizes in the modelspec standard.
    """

    kind: str
    projections: tuple[Projection, ...]
    label: str = ""
    texts: Mapping[str, Text] = field(default_factory=dict)
    prediction: str = EPSILON
    cross_attention: bool = True
    marks: tuple[str, ...] = ()
    embedding: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    cannot: str = ""
    sizes: Mapping[tuple[int, int], str] = field(default_factory=dict)
    side: int = 0
    prefixes: tuple[str, ...] = ("model.diffusion_model.", "diffusion_model.")
    kohya: str = "lora_unet_{diffusers}"
    lora_facts: Mapping[str, str] = field(default_factory=dict)
    modelspec: str = ""

    @property
    def keys_and_values(self) -> tuple[Projection, ...]:
        """Of the blocks whose keys and values are made of text alone, so that a delta may change each of these layers."""
        return tuple(p for p in self.projections if p.keys_or_values) if self.cross_attention else ()

    @property
    def direct(self) -> bool:
        """Whether keys and values are made of the context itself, so that a change of them is a change of their weights."""
        return bool(self.keys_and_values) and all(p.group == CONTEXT for p in self.keys_and_values)

    def marked(self, names: Collection[str]) -> bool:
        """Whether these names of weights, without prefix and ``.weight``, hold one of ``marks``."""
        return any(all((w[1:] not in names) if w.startswith("-") else w in names for w in mark.split()) for mark in self.marks)

    def has(self, site: str) -> bool:
        """Whether a site has the name of one of the family's :attr:`keys_and_values`."""
        projections = self.keys_and_values
        return bool(projections) and _any(projections, "site").fullmatch(site) is not None

    def recognises(self, shapes: Shapes) -> bool:
        """Whether these ``(d_out, d_in)`` by site are those of a model of the family."""
        d_ins = {d_in for d_in, _ in self.sizes}
        return (not d_ins or {shape[1] for shape in shapes.values()} <= d_ins) and all(map(self.has, shapes))

    def published(self, shapes: Shapes) -> str:
        """Name of the published architecture with these shapes; empty if there is none."""
        d_ins = {shape[1] for shape in shapes.values()}
        return self.sizes.get((d_ins.pop(), len(shapes)), "") if len(d_ins) == 1 else ""

    def architecture(self, shapes: Shapes) -> str:
        """Name of the published architecture, or one made of d_in and the list of layers."""
        if known := self.published(shapes):
            return known
        d_ins = sorted({shape[1] for shape in shapes.values()})
        digest = hashlib.sha256(repr(sorted((n, tuple(s)) for n, s in shapes.items())).encode()).hexdigest()[:8]
        return f"{self.kind}-{'+'.join(map(str, d_ins))}x{len(shapes) // 2}-{digest}"

    def find(self, names: Iterable[str], group: str = CONTEXT) -> dict[str, str]:
        """Sites of a group in the order of the forward pass, and the name of each among ``names``.

        Args:
            names: all modules of a model or all weights of a file (without ``.weight``), as single files or diffusers name them.
        """
        bare = {next((n[len(p) :] for p in self.prefixes if n.startswith(p)), n): n for n in names}
        found = self.from_diffusers(bare) | self._sites(bare, "path")
        places = ((self._place(site, group), site) for site in found)
        return {site: bare[found[site]] for place, site in sorted(p for p in places if p[0])}

    def _place(self, site: str, group: str) -> tuple[int, ...]:
        """What sites are sorted by: the layer's pattern and numbers, then the projection; () if it reads another group."""
        stems = [p.site.rpartition(".")[0] for p in self.projections]
        for index, p in enumerate(self.projections):
            numbers = p.numbers("site", site)
            if numbers is not None:
                return (stems.index(stems[index]), *map(int, numbers), index) if p.group == group else ()
        return ()

    def file_names(self, sites: Iterable[str]) -> dict[str, str]:
        """Names of the modules in a whole checkpoint, by site."""
        return {site: self.prefixes[0] + path for site, path in self._renamed(sites, "site", "path").items()}

    def kohya_names(self, sites: Collection[str]) -> dict[str, str]:
        """Names of the layers in a LoRA file, by site; kohya's loaders, Automatic1111, Forge, ComfyUI and diffusers all read these."""
        paths = self._renamed(sites, "site", "path")
        theirs = self.to_diffusers(sites)
        return {s: self.kohya.format(diffusers=theirs[s], path=paths[s]).replace(".", "_") for s in sites}

    def to_diffusers(self, sites: Collection[str]) -> dict[str, str]:
        """Names of the modules in diffusers, by site."""
        return self._renamed(sites, "site", "diffusers")

    def from_diffusers(self, names: Collection[str]) -> dict[str, str]:
        """Those of ``names`` that are diffusers' names of sites, by site."""
        return self._sites(names, "diffusers")

    def _sites(self, names: Iterable[str], naming: str) -> dict[str, str]:
        """Those of ``names`` that a naming has, by site; a fused module has several."""
        return {
            p.site.replace("*", "{}").format(*numbers): name
            for name in filter(_any(self.projections, naming).fullmatch, names)
            for p in self.projections
            if (numbers := p.numbers(naming, name)) is not None
        }

    def _renamed(self, names: Iterable[str], old: str, new: str) -> dict[str, str]:
        return {
            name: p.template(new).replace("*", "{}").format(*numbers)
            for name in filter(_any(self.projections, old).fullmatch, names)
            for p in self.projections
            if (numbers := p.numbers(old, name)) is not None
        }
