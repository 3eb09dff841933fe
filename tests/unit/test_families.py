"""Families of models: their names in files and programs, and that a new one is one file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import sepme
from sepme.errors import SepMEError
from sepme.model.families import FAMILIES, family_of, find, is_site, labels
from sepme.model.families.unet import FAMILY as UNET
from sepme.model.families.unet import diffusers_to_ldm

SD15 = ([[1, 1], [1, 1], [1, 1], [0, 0]], 1, [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
SDXL = ([[0, 0], [2, 2], [10, 10]], 10, [[10, 10, 10], [2, 2, 2], [0, 0, 0]])
SMALL = ([[1], [1]], 1, [[1, 1], [0, 0]])
LARGE = ([[0, 0, 0], [1, 1, 1], [0, 0, 0], [3, 3, 3]], 3, [[3, 3, 3, 3], [0] * 4, [1] * 4, [0] * 4])
NO_MIDDLE = ([[1]], 0, [[1, 1]])


def both(layers: dict[str, str]) -> dict[str, str]:
    """diffusers' names by site, from those of the layers."""
    return {f"{ldm}.{end}": f"{theirs}.{end}" for theirs, ldm in layers.items() for end in ("to_k", "to_v")}


def modules(blocks: Any) -> list[str]:
    """Names of resnets and text projections of a diffusers UNet with these blocks."""
    sides = (("down_blocks", blocks[0]), ("up_blocks", blocks[2]))
    resnets = [f"{s}.{b}.resnets.{j}.conv1" for s, levels in sides for b, units in enumerate(levels) for j in range(len(units))]
    return [*both(diffusers_to_ldm(*blocks)).values(), *resnets, "mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"]


def test_sdxl_names() -> None:
    """SDXL: no attention in the first block, depths 2 and 10; 70 layers."""
    names = list(diffusers_to_ldm([[0, 0], [2, 2], [10, 10]], 10, [[10, 10, 10], [2, 2, 2], [0, 0, 0]]).values())
    assert len(names) == len(set(names)) == 70
    blocks = list(dict.fromkeys(n.split(".transformer")[0] for n in names))
    assert blocks == [f"input_blocks.{i}.1" for i in (4, 5, 7, 8)] + ["middle_block.1"] + [f"output_blocks.{i}.1" for i in range(6)]
    assert names[-1] == "output_blocks.5.1.transformer_blocks.1.attn2"


def test_names_map_one_to_one() -> None:
    names = diffusers_to_ldm([[1, 1], [0, 0]], 0, [[0, 0, 0], [1, 1, 1]])
    assert names == {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2": "input_blocks.1.1.transformer_blocks.0.attn2",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2": "input_blocks.2.1.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2": "output_blocks.3.1.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2": "output_blocks.4.1.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2": "output_blocks.5.1.transformer_blocks.0.attn2",
    }


@pytest.mark.parametrize("blocks", [SD15, SDXL, SMALL, LARGE, NO_MIDDLE])
def test_both_namings_are_inverses(blocks: Any) -> None:
    known = both(diffusers_to_ldm(*blocks))
    assert UNET.to_diffusers(known) == known
    assert list(find(modules(blocks)).items()) == list(known.items())
    assert list(find(reversed([f"model.diffusion_model.{site}" for site in known]))) == list(known)


def test_names_of_the_real_class() -> None:
    """SDXL as diffusers builds it, and a UNet whose levels have different numbers of resnets: attention modules in forward order."""
    for config in (
        {"transformer_layers_per_block": (1, 2, 10), "block_out_channels": (32, 64, 128), "layers_per_block": 2},
        {"transformer_layers_per_block": (1, 2, 1), "block_out_channels": (32, 64, 128), "layers_per_block": (1, 3, 2)},
    ):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048, **config,
            )  # fmt: skip
        found = find(name for name, _ in unet.named_modules())
        theirs = {name for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
        assert set(found.values()) == theirs
        order = ["down_blocks", "mid_block", "up_blocks"]
        assert [order.index(name.split(".")[0]) for name in found.values()] == sorted(order.index(n.split(".")[0]) for n in theirs)
        downs = [site for site in found if site.startswith("input_blocks") and site.endswith("0.attn2.to_k")]
        first = 4 if config["layers_per_block"] == 2 else 3
        assert downs[0] == f"input_blocks.{first}.1.transformer_blocks.0.attn2.to_k"
    assert family_of(dict.fromkeys(found, (64, 2048))).side == 128


@pytest.mark.parametrize("sites", [["transformer.1.attn2.to_k"], ["middle_block.1.transformer_blocks.0.attn2.to_k"], []])
def test_foreign_layers_have_no_names(sites: list[str]) -> None:
    with pytest.raises(SepMEError, match="not those of a Stable Diffusion UNet"):
        UNET.to_diffusers(sites)


def test_what_is_no_site() -> None:
    assert is_site("middle_block.1.transformer_blocks.0.attn2.to_v")
    for name in ("middle_block.1.transformer_blocks.0.attn2.to_q", "middle_block.1.transformer_blocks.x.attn2.to_v", "", "to_k"):
        assert not is_site(name)
        assert find([name]) == {}


def test_families_are_apart() -> None:
    """No shapes of one published architecture are recognised as another; messages list all."""
    published = [(f.keys_and_values[0].site, size, name) for f in FAMILIES for size, name in f.sizes.items()]
    assert len({name for *_, name in published}) == len({p[:2] for p in published}) == 14
    for f in FAMILIES:
        for (d_in, count), name in f.sizes.items():
            sites = [p.site.replace("*", str(i)) for i in range(count) for p in f.keys_and_values][:count]
            assert family_of(dict.fromkeys(sites, (64, d_in))).architecture(dict.fromkeys(sites, (64, d_in))) == name
    assert labels() == "SD1.x, SD2.x or SDXL"


def test_docs_are_the_data() -> None:
    """docs/families.md is what docs/families_table.py writes."""
    docs = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("families_table", docs / "families_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() == (docs / "families.md").read_text(encoding="utf-8"), "python docs/families_table.py writes it again"


def test_kolors_is_no_sdxl() -> None:
    """The same names of layers, but they read an embedding: no host may take it for SDXL; an IP-Adapter's projection is none of Kolors."""
    names = [*modules(SDXL), "encoder_hid_proj"]
    assert find(names) == {}
    assert len(find([*names, "encoder_hid_proj.image_projection_layers"])) == 140


def test_flow_families_are_no_unets() -> None:
    """A model whose layers hosts cannot change yet has none for them; its deltas are still known by name."""
    names = [f"model.diffusion_model.blocks.{i}.cross_attn.{p}_proj" for i in range(28) for p in "kv"]
    assert find(names) == {}
    sites = [f"blocks.{i}.cross_attn.to_{p}" for i in range(28) for p in "kv"]
    family = family_of(dict.fromkeys(sites, (2048, 1024)))
    assert family.architecture(dict.fromkeys(sites, (2048, 1024))) == "cosmos-predict2-2b"
    assert list(family.file_names(sites).values()) == names
    assert all(map(is_site, sites))
    assert not any(map(is_site, ("txt_in", "context_refiner.0.attention.to_k", "label_emb.0.0", "blocks.0.attn2.kv_proj.to_k")))


NEW = """\"\"\"A transformer whose blocks read text.\"\"\"

from .family import Family, Projection

FAMILY = Family(
    "toy",
    (
        *(Projection(f"blocks.*.cross_attn.to_{p}", f"blocks.*.cross_attn.{p}_proj", f"transformer_blocks.*.attn2.to_{p}") for p in "kv"),
        Projection("vector_in", group="pooled"),
    ),
    label="Toy",
    sizes={(24, 4): "toy-small"},
    side=6,
    kohya="lora_unet_{path}",
    lora_facts={"ss_base_model_version": "toy"},
    modelspec="toy-v1",
)
"""
USE = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
import sepme
from sepme.concepts import Concept
from sepme.convert import export_checkpoint, export_lora
from sepme.convert.foreign import read_foreign
from sepme.delta.concept_delta import ConceptDelta
from sepme.model.families import family_of, labels
from sepme.model.layers import architecture, latent_side, projections, shapes, text_layers, weights

def model(k, v, block, attention):
    made = [nn.ModuleDict({attention: nn.ModuleDict({"q": nn.Linear(8, 8), k: nn.Linear(24, 8), v: nn.Linear(24, 8)})}) for _ in range(2)]
    return nn.ModuleDict({"vector_in": nn.Linear(5, 8), block: nn.ModuleList(made)})

folder = Path(sys.argv[1])
own, theirs = model("k_proj", "v_proj", "blocks", "cross_attn"), model("to_k", "to_v", "transformer_blocks", "attn2")
layers = text_layers(own)
sites = list(projections(layers))
assert projections(layers)["blocks.1.cross_attn.to_v"] is own["blocks"][1]["cross_attn"]["v_proj"]
names = family_of(shapes(layers)).to_diffusers(sites)
assert names == {s: s.replace("blocks", "transformer_blocks").replace("cross_attn", "attn2") for s in sites}
up = {n: torch.randn(8, 2) for n in sites}
delta = ConceptDelta.from_factors(Concept("star"), torch.linalg.qr(torch.randn(24, 2)).Q.T, up, 0.1, {})
delta = ConceptDelta.load(delta.save(folder / "star.safetensors"))
save_file({f"model.diffusion_model.{n}": t for n, t in own.state_dict().items()}, folder / "model.safetensors")
lora = export_lora([delta], folder / "lora.safetensors")
merged = export_checkpoint([delta], folder / "model.safetensors", folder / "merged.safetensors")
changes = {kind: dict(read_foreign(path, weights(layers))) for kind, path in (("lora", lora), ("merged", merged))}
error = max(float((found[n] - delta.weight_delta(n)).abs().max()) for found in changes.values() for n in sites)
with safe_open(lora, framework="pt") as file:
    keys, facts = sorted(file.keys()), file.metadata()
print(json.dumps({
    "sepme": sepme.__file__, "sites": sites, "architecture": [architecture(shapes(layers)), delta.architecture],
    "from_diffusers": sorted(text_layers(theirs)), "labels": labels(), "side": latent_side(layers),
    "key": keys[0], "base": facts["ss_base_model_version"], "modelspec": facts["modelspec.architecture"], "error": error,
}))
"""


def test_a_new_family_is_one_file(tmp_path: Path) -> None:
    """Written into a copy of the package, one file is enough for recognition, names, delta files, LoRA export, merging and import."""
    package = Path(sepme.__file__).parent
    shutil.copytree(package, tmp_path / "sepme", ignore=shutil.ignore_patterns("__pycache__", "demo", "evaluate", "bench", "hosts", "cli"))
    (tmp_path / "sepme" / "model" / "families" / "toy.py").write_text(NEW, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    layers = ["blocks.0.cross_attn", "blocks.1.cross_attn"]
    assert data.pop("error") < 2e-2
    assert data == {
        "sepme": str(tmp_path / "sepme" / "__init__.py"),
        "sites": [f"{layer}.to_{p}" for layer in layers for p in "kv"],
        "architecture": ["toy-small", "toy-small"],
        "from_diffusers": layers,
        "labels": "SD1.x, SD2.x, SDXL or Toy",
        "side": 6,
        "key": "lora_unet_blocks_0_cross_attn_k_proj.alpha",
        "base": "toy",
        "modelspec": "toy-v1/lora",
    }
