"""A model's text projections: their modules, weights and shapes, the architecture that they say, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .blocks import TextBlocks as TextBlocks
from .families import CONTEXT, Shapes, context_architecture, ends, family_of, find, recognise
from .protocols import AttentionLayer

Layers = Mapping[str, AttentionLayer] | TextBlocks
_sites: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()  # a walk over all modules would show at every toggle


def text_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a host's or diffusers' denoiser, by the beginning that their sites have in common.

    They come in the order of the forward pass; a model of no known family has none. The model may be compiled, as a whole or in parts:
    ``torch.compile`` puts a module of its own around each.
    """
    if model not in _sites:
        paths: dict[str, str] = {}
        for path, _ in model.named_modules():
            paths.setdefault(path.replace("_orig_mod.", "").removesuffix("._orig_mod"), path)
        found = find(paths)
        _sites[model] = {site.rpartition(".")[0]: paths[name].rpartition(".")[0] for site, name in found.items()}
    return {layer: cast(AttentionLayer, model.get_submodule(path)) for layer, path in _sites[model].items()}


def projections(layers: Layers) -> dict[str, nn.Module]:
    """The text projections by site, for UNets the ``to_k`` and ``to_v`` modules by ``<layer>.to_k`` / ``<layer>.to_v``; of
    :class:`TextBlocks`, whose modules may have two sites, by path."""
    if isinstance(layers, TextBlocks):
        return dict(layers.modules)
    return {f"{name}.{end}": getattr(layer, module) for name, layer in layers.items() for end, module in ends(name).items()}


def weight_of(module: nn.Module) -> Tensor:
    """The weight ``(d_out, d_in)`` of a projection."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def shapes(layers: Layers) -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` by projection name, d_in the context's."""
    if isinstance(layers, TextBlocks):
        return dict(layers.shapes)
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights(layers).items()}


def weights(layers: Layers) -> dict[str, Tensor]:
    """K/V weights ``(d_out, d_in)`` by projection name, detached; of :class:`TextBlocks` d_in is that of what the layers read."""
    if isinstance(layers, TextBlocks):
        return layers.weights()
    return {name: weight_of(module).detach() for name, module in projections(layers).items()}


def architecture(kv_shapes: Shapes) -> str:
    """Name of the architecture with these K/V shapes: sd15, sd21, sdxl ..., or one made of d_in and the layer list."""
    return family_of(kv_shapes).architecture(kv_shapes)


def fitting(kv_shapes: Shapes) -> tuple[str, ...]:
    """Architectures of the deltas that fit a model with these K/V shapes: its own, and that of edits of the context that it reads."""
    return architecture(kv_shapes), *(context_architecture(d_in) for d_in in sorted({d_in for _, d_in in kv_shapes.values()}))


def context_architectures(model: nn.Module) -> tuple[str, ...]:
    """Architectures of the deltas that edit what a denoiser of any family reads; none where nothing is known of it."""
    modules = dict(model.named_modules())
    family = recognise({name: tuple(weight.shape) for name, weight in model.named_parameters()} | dict.fromkeys(modules, ()))
    if family is None or CONTEXT not in family.texts:
        return ()
    readers = (getattr(modules[path], "in_features", 0) for path in family.find(modules).values())  # a packed weight has another shape
    return tuple(context_architecture(d_in) for d_in in sorted({*readers} - {0} or {*family.texts[CONTEXT].widths}))


def latent_side(layers: Layers) -> int:
    """Latents along one side of an image of the family's usual size; 0 for models of unpublished width."""
    return family_of(shapes(layers)).side


def kv_fingerprint(layers: Layers) -> str:
    """Hash of a checkpoint's K/V weights (rounded to float16, so that precision on disk does not matter)."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights(layers).items()):
        digest.update(name.encode())
        digest.update(weight.to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def leave_inference_mode(model: nn.Module) -> None:
    """Parameters and buffers that were made under inference mode cannot take part in a graph: put equal ones in their place, one by one."""
    with torch.inference_mode(False):
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in stores:
                for name, value in held.items():
                    if value is not None and value.is_inference():
                        plain = value.detach().clone()
                        held[name] = nn.Parameter(plain, value.requires_grad) if isinstance(value, nn.Parameter) else plain
