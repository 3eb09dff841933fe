"""LoRA files as others read them: names, factors, strengths, diffusers' own loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm_files
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sepme.convert import export_lora
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.model.families.unet import diffusers_to_ldm
from sepme.model.layers import projections, text_layers, weights

SD15 = ([[1, 1], [1, 1], [1, 1], [0, 0]], 1, [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def test_kohya_key_of_sd15(make_random_delta: Callable[..., ConceptDelta], tmp_path: Path) -> None:
    shapes = {f"{n}.{p}": (8, 768) for n in diffusers_to_ldm(*SD15).values() for p in ("to_k", "to_v")}
    tensors, metadata = read(export_lora([make_random_delta("star", shapes)], tmp_path / "a.safetensors"))
    assert len(tensors) == 3 * 32
    stem = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= set(tensors)
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_factors_strengths_and_metadata(
    host: Any, make_random_delta: Callable[..., ConceptDelta], shapes_of: Callable[[Any], Any], tmp_path: Path
) -> None:
    """Concatenated rank, strengths folded in, tiny up-factors without subnormals, the same bytes twice."""
    shapes = shapes_of(host)
    star, moon, sun = (
        make_random_delta(n, shapes, rank=r, seed=r, size=z) for n, r, z in (("star", 3, 1), ("moon", 2, 1e-6), ("sun", 1, 1))
    )
    given = {"STAR": 0.5, "sun": 0}
    path = export_lora([star, moon, sun], tmp_path / "a.safetensors", given)
    assert path.read_bytes() == export_lora([star, moon, sun], tmp_path / "b.safetensors", given).read_bytes()
    tensors, metadata = read(path)
    theirs = {f"{ldm}.{p}": f"lora_unet_{n}_{p}".replace(".", "_") for n, ldm in host_names(host).items() for p in ("to_k", "to_v")}
    assert len(tensors) == 3 * len(theirs)
    for name, key in theirs.items():
        down, up = tensors[f"{key}.lora_down.weight"].float(), tensors[f"{key}.lora_up.weight"].float()
        assert (up.shape, down.shape, tensors[f"{key}.alpha"].item()) == ((shapes[name][0], 5), (5, shapes[name][1]), 5)
        for part, delta, strength in ((slice(0, 3), star, 0.5), (slice(3, 5), moon, 1)):
            expected = strength * delta.weight_delta(name)
            assert (up[:, part] @ down[part] - expected).abs().max() <= 2e-3 * expected.abs().max()
    concepts = json.loads(metadata["sepme.concepts"])
    assert [(c["name"], c["strength"]) for c in concepts] == [("star", 0.5), ("moon", 1)]
    assert concepts[0]["content_hash"] == star.content_hash()
    assert metadata["sepme.gate"].startswith("off")
    assert metadata["ss_network_dim"] == "5"


def host_names(host: Any) -> dict[str, str]:
    """Canonical names by diffusers' names, found in the UNet itself."""
    by_module = {id(m): n for n, m in host.unet.named_modules()}
    return {by_module[id(layer)]: ldm for ldm, layer in text_layers(host.unet).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_loads_it(
    dtype: torch.dtype, make_host: Callable[..., Any], make_random_delta: Callable[..., ConceptDelta], shapes_of: Any, tmp_path: Path
) -> None:
    """diffusers' own loader: every K and V gets ``c ΔWᵀ``, at the loader's own scale too, and unloading takes it away."""
    pytest.importorskip("peft")
    host = make_host()
    shapes = shapes_of(host)
    deltas = [make_random_delta("star", shapes, rank=3, seed=1), make_random_delta("moon", shapes, rank=2, seed=2)]
    path = export_lora(deltas, tmp_path / "lora.safetensors", {"moon": -0.5}, dtype)
    before = {n: w.clone() for n, w in weights(host.attention_layers()).items()}
    context = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(3))
    host.pipe.load_lora_weights(path, adapter_name="sepme")
    host.pipe.set_adapters(["sepme"], [0.75])
    for name, module in projections(host.attention_layers()).items():
        delta = deltas[0].weight_delta(name) - 0.5 * deltas[1].weight_delta(name)
        expected = context @ (0.75 * delta).T
        with torch.no_grad():
            got = module(context) - context @ before[name].T
        assert expected.abs().max() > 0.1
        assert (got - expected).abs().max() <= (2e-6 if dtype is torch.float32 else 2e-3) * expected.abs().max() + 1e-5
    host.pipe.unload_lora_weights()
    assert all(torch.equal(w, before[n]) for n, w in weights(host.attention_layers()).items())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_every_kind(kind: str, make_random_delta: Callable[..., ConceptDelta], tmp_path: Path) -> None:
    """The published layouts, SDXL's blocks of two and ten transformers included."""
    pytest.importorskip("peft")
    pipe = ldm_files.pipeline(kind)
    layers = text_layers(pipe.unet)
    before = weights(layers)
    delta = make_random_delta("star", {n: (w.shape[0], w.shape[1]) for n, w in before.items()})
    pipe.load_lora_weights(export_lora([delta], tmp_path / "lora.safetensors", dtype=torch.float32))
    context = torch.randn(1, 4, delta.d_in, generator=torch.Generator().manual_seed(3))
    for name, module in projections(layers).items():
        with torch.no_grad():
            torch.testing.assert_close(module(context), context @ (before[name] + delta.weight_delta(name)).T, rtol=1e-4, atol=1e-4)


def test_values_only_leaves_keys_out(host: Any, make_random_delta: Callable[..., ConceptDelta], shapes_of: Any, tmp_path: Path) -> None:
    delta = make_random_delta("star", shapes_of(host))
    up = {n: torch.zeros_like(y) if n.endswith("to_k") else y.float() for n, y in delta.up.items()}
    half = ConceptDelta.from_factors(delta.concept, delta.down, up, 0.0, {})
    tensors, _ = read(export_lora([half], tmp_path / "a.safetensors"))
    assert len(tensors) == 3 * len(up) // 2
    assert all("_attn2_to_v." in key for key in tensors)


def test_refusals(host: Any, make_random_delta: Callable[..., ConceptDelta], shapes_of: Any, tmp_path: Path) -> None:
    star = make_random_delta("star", shapes_of(host))
    for deltas, options, message in (
        ([], {}, "Nothing is left"),
        ([star], {"strengths": {"star": 0}}, "Nothing is left"),
        ([star], {"strengths": {"moon": 1}}, "no concept 'moon'"),
        ([star, star], {}, "Two deltas"),
        ([star], {"dtype": torch.float64}, "float16, bfloat16 or float32"),
        ([make_random_delta("star", shapes_of(host), size=0)], {}, "change nothing"),
    ):
        with pytest.raises(SepMEError, match=message):
            export_lora(deltas, tmp_path / "a.safetensors", **options)
    with pytest.raises(SepMEError, match=r"end it in \.safetensors"):
        export_lora([star], tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
