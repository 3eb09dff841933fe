"""What a family of models is to SepME: which of its linear layers read text, and what other programs call them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

Shapes = Mapping[str, tuple[int, int]]
CONTEXT = "context"


@dataclass(frozen=True)
class Projection:
    """Linear layers that read text and nothing else. In the names ``*`` stands for a number, in all of them the same numbers.

    Attributes:
        site: name in delta files and everywhere in SepME.
        path: module in single files and in ComfyUI's and Automatic1111's models; the same as ``site`` if empty.
        diffusers: module in diffusers' models; the same as ``path`` if empty.
        group: the text input that it reads: the context, or the name of another one (a pooled vector, a second encoder). Layers of
            other groups have names, but are no part of the edit of the context.
    """

    site: str
    path: str = ""
    diffusers: str = ""
    group: str = CONTEXT

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
        projections: in the order of the forward pass.
        label: what people call the models; messages list it.
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
    sizes: Mapping[tuple[int, int], str] = field(default_factory=dict)
    side: int = 0
    prefixes: tuple[str, ...] = ("model.diffusion_model.", "diffusion_model.")
    kohya: str = "lora_unet_{diffusers}"
    lora_facts: Mapping[str, str] = field(default_factory=dict)
    modelspec: str = ""

    def has(self, site: str) -> bool:
        """Whether a site has a name of the family."""
        return _any(self.projections, "site").fullmatch(site) is not None

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
        found = self.from_diffusers(bare) | {site: name for name, site in self._renamed(bare, "path", "site").items()}
        places = ((self._place(site, group), site) for site in found)
        return {site: bare[found[site]] for place, site in sorted(p for p in places if p[0])}

    def _place(self, site: str, group: str) -> tuple[int, ...]:
        """What sites are sorted by: the layer's pattern and numbers, then the projection; () if it reads another group."""
        stems = [p.site.rpartition(".")[0] for p in self.projections]
        for index, p in enumerate(self.projections):
            numbers = p.numbers("site", site)
            if p.group == group and numbers is not None:
                return stems.index(stems[index]), *map(int, numbers), index
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
        return {site: name for name, site in self._renamed(names, "diffusers", "site").items()}

    def _renamed(self, names: Iterable[str], old: str, new: str) -> dict[str, str]:
        return {
            name: p.template(new).replace("*", "{}").format(*numbers)
            for name in filter(_any(self.projections, old).fullmatch, names)
            for p in self.projections
            if (numbers := p.numbers(old, name)) is not None
        }
