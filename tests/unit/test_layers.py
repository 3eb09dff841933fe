"""Names of cross-attention layers, architecture, fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sepme.model.layers import architecture, kv_fingerprint, projections, text_layers, weights

SD15 = [f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"] + [f"output_blocks.{i}.1" for i in range(3, 12)]


def tail(names: list[str]) -> list[str]:
    return [f"{n}.transformer_blocks.0.attn2" for n in names]


@pytest.fixture(scope="module")
def sd15_shaped() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's own block layout (the defaults of the class), narrow."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8, 8, 8), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2
    ).eval()  # fmt: skip


def test_sd15_names_in_forward_order(sd15_shaped: UNet2DConditionModel) -> None:
    """The 16 canonical names, and their order is the order in which a forward pass meets them."""
    layers = text_layers(sd15_shaped)
    assert list(layers) == tail(SD15)
    met, names = [], {id(layer): name for name, layer in layers.items()}
    handles = [layer.register_forward_hook(lambda m, a, o: met.append(names[id(m)])) for layer in layers.values()]
    with torch.no_grad():
        sd15_shaped(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 3, 8))
    for handle in handles:
        handle.remove()
    assert met == list(layers)


def test_all_cross_attention_is_found(sd15_shaped: UNet2DConditionModel) -> None:
    theirs = {n for n, _ in sd15_shaped.named_modules() if n.endswith("attn2")}
    found = {id(m) for m in text_layers(sd15_shaped).values()}
    assert found == {id(sd15_shaped.get_submodule(n)) for n in theirs}
    assert len(found) == len(theirs) == 16


def test_compiled_models_are_looked_through() -> None:
    """``torch.compile`` around the whole, a block, a layer or a projection: the same names, and modules that hold the same weights."""
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    stock = weights(text_layers(model))
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn2.to_v = torch.compile(block.attn2.to_v)
    model.mid_block.attentions[0].transformer_blocks[0].attn2 = torch.compile(model.mid_block.attentions[0].transformer_blocks[0].attn2)
    model.up_blocks[1] = torch.compile(model.up_blocks[1])
    found = weights(text_layers(torch.compile(model)))
    assert list(found) == list(stock)
    assert all(found[n].data_ptr() == stock[n].data_ptr() for n in stock)


def test_unet_without_middle_attention() -> None:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None,
    )  # fmt: skip
    assert list(text_layers(unet)) == tail(["input_blocks.3.1", "output_blocks.0.1", "output_blocks.1.1"])


def test_projections_and_weights(sd15_shaped: UNet2DConditionModel) -> None:
    layers = text_layers(sd15_shaped)
    modules = projections(layers)
    assert len(modules) == 32
    first = tail(SD15)[0]
    assert modules[f"{first}.to_v"] is layers[first].to_v
    found = weights(layers)
    assert list(found) == list(modules)
    assert torch.equal(found[f"{first}.to_k"], layers[first].to_k.weight)
    assert not found[f"{first}.to_k"].requires_grad


@pytest.mark.parametrize(("d_in", "count", "name"), [(768, 32, "sd15"), (1024, 32, "sd21"), (2048, 140, "sdxl")])
def test_known_architectures(d_in: int, count: int, name: str) -> None:
    assert architecture({f"input_blocks.{i}.1.transformer_blocks.0.attn2.to_k": (320, d_in) for i in range(count)}) == name


def test_structural_architectures_tell_models_apart() -> None:
    base = {"a.to_k": (8, 64), "a.to_v": (8, 64)}
    name = architecture(base)
    assert name.startswith("unet-64x1-")
    assert architecture(dict(reversed(base.items()))) == name
    changed = [base | {"a.to_k": (9, 64)}, {"b.to_k": (8, 64), "b.to_v": (8, 64)}, {"a.to_k": (8, 32), "a.to_v": (8, 32)}]
    assert len({name, *map(architecture, changed)}) == 4
    assert architecture({"a.to_k": (8, 64), "a.to_v": (8, 32)}).startswith("unet-32+64x1-")


def test_fingerprint(make_host: Callable[..., Any], host: Any) -> None:
    """Stable under rounding to fp16 on disk; another weight, another layer's name or other values change it."""
    full, half = kv_fingerprint(host.attention_layers()), kv_fingerprint(make_host(torch.float16).attention_layers())
    assert full == half
    assert len(full) == 16
    other = make_host()
    back = make_host(torch.float16)
    back.unet.float()
    assert kv_fingerprint(back.attention_layers()) == full
    layers = other.attention_layers()
    assert kv_fingerprint(dict(reversed(layers.items()))) == full
    assert kv_fingerprint({f"x{n}": m for n, m in layers.items()}) != full
    with torch.no_grad():
        next(iter(layers.values())).to_v.weight[0, 0] += 0.01
    assert kv_fingerprint(layers) != full
