"""Keys and values of blocks that are no UNet's: with a bias, both made by one module, or made of an embedding of the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import SepMEError
from .families import CONTEXT, EMBEDDED, Family, Shapes, recognise


class _Places(NamedTuple):
    """Where a model has what :class:`TextBlocks` holds; modules may be replaced by others."""

    family: Family
    paths: Mapping[str, str]
    sites: Mapping[str, tuple[str, ...]]
    embedding: tuple[str, ...]
    reads: str


_known: WeakKeyDictionary[nn.Module, _Places | None] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TextBlocks:
    """A model's modules that make keys and values of text alone.

    A delta adds ``Y_l (c D)`` to what each of them returns. It reads the context c as the model is given it, whatever the model makes of it
    before: untouched rows keep their bits, and one subspace and one gate serve the context and every layer.

    Attributes:
        family: the model's.
        modules: by their paths in the model, in the order of the forward pass.
        sites: by path, whose outputs lie side by side in the module's.
        embedding: what makes of the context what the modules read, one after the other; none where they read the context itself, or the
            context and behind it other texts.
        d_in: channels of the context.
    """

    family: Family
    modules: Mapping[str, nn.Module]
    sites: Mapping[str, tuple[str, ...]]
    embedding: tuple[nn.Module, ...]
    d_in: int

    @staticmethod
    def of(model: nn.Module) -> TextBlocks | None:
        """Those of a host's or diffusers' denoiser, compiled or not; None of a UNet that reads the context itself, and where text and
        picture are mixed."""
        if model not in _known:
            _known[model] = _find(model)
        at = _known[model]
        if at is None:
            return None
        modules = {path: model.get_submodule(actual) for path, actual in at.paths.items()}
        weight = model.get_submodule(at.reads).weight
        assert isinstance(weight, Tensor)
        return TextBlocks(at.family, modules, at.sites, tuple(map(model.get_submodule, at.embedding)), weight.shape[1])

    @property
    def direct(self) -> bool:
        """Whether the modules read the context itself and nothing else."""
        return self.family.direct

    @cached_property
    def shapes(self) -> Shapes:
        """``(d_out, d_in)`` by site, d_in the context's."""
        return {site: (len(weight), self.d_in) for site, weight in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """``(d_out, width of what the module reads)`` by site, detached."""
        found: dict[str, Tensor] = {}
        for path, sites in self.sites.items():
            weight = self.modules[path].weight
            assert isinstance(weight, Tensor)
            found |= dict(zip(sites, weight.detach().chunk(len(sites)), strict=True))
        return found

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What the modules read of tokens ``(n, d_in)``, in the model's dtype and on its device."""
        for module in self.embedding:
            some = next(module.parameters())
            whole = some.dtype.is_floating_point and some.dtype.itemsize > 1  # others are cast to what they are given
            tokens = module(tokens.to(some.device, some.dtype if whole else torch.float32))
        return tokens


def _find(model: nn.Module) -> _Places | None:
    plain = {path.replace("_orig_mod.", "").removesuffix("._orig_mod"): path for path, _ in reversed(list(model.named_modules()))}
    names = (name.replace("_orig_mod.", "").replace(".base_layer.", ".") for name, _ in model.named_parameters())
    family = recognise(dict(zip(names, (tuple(p.shape) for p in model.parameters()), strict=True)))
    if family is None or not family.keys_and_values or (family.direct and not family.marks):
        return None
    sites: dict[str, tuple[str, ...]] = {}
    for site, path in family.find(plain, CONTEXT if family.direct else EMBEDDED).items():
        if family.has(site):
            sites[path] = (*sites.get(path, ()), site)
    if not sites:
        return None
    embedding = next((names for names in reversed(family.embedding) if names and plain.keys() >= set(names)), ())
    if any(family.embedding) and not embedding:
        raise SepMEError(f"This {family.label} embeds the text in another way than the published ones; edit the context instead of layers.")
    reads = next(iter(family.find(plain).values()), next(iter(sites)))
    return _Places(family, {path: plain[path] for path in sites}, sites, tuple(plain[n] for n in embedding), plain[reads])
