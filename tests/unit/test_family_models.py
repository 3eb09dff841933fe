"""The families' tables against diffusers' own classes, tiny; what an edit of the context leaves alone, bit for bit."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from planning import OPTIONS, ORDINARY, HashedEncoder, book_of
from tiny import diffusers_models
from tiny.checks import LAYERED, check_exact, check_layers, check_lora, check_recognised, check_table

from sepme.apply.composition import Composition
from sepme.apply.kv_cache import room
from sepme.apply.projector import KVProjector
from sepme.concepts import Concept
from sepme.convert import export_lora
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.model.blocks import TextBlocks
from sepme.model.layers import architecture
from sepme.plan.planner import Planner
from sepme.train import TrainOptions
from sepme.train.make import make_deltas

FAMILIES = [pytest.param(name, id=name) for name in diffusers_models.MODELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_is_the_model(name: str) -> None:
    tiny = diffusers_models.build(name)
    check_table(name, tiny, "diffusers")
    check_recognised(name, tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_context_edit_is_exact(name: str, dtype: torch.dtype) -> None:
    check_exact(diffusers_models.build(name, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(LAYERED & set(diffusers_models.MODELS)))
def test_deltas_of_layers_are_exact(name: str, dtype: torch.dtype) -> None:
    check_layers(name, diffusers_models.build(name, dtype))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lora_form_equals_the_edit(name: str) -> None:
    """In float64, but for classes that keep parts in float32: it is the edits that are compared, not a network's rounding."""
    mixed = name in ("cosmos_predict2", "kandinsky5", "krea2", "wan")
    check_lora(name, diffusers_models.build(name, torch.float32 if mixed else torch.float64))


@pytest.fixture(scope="module")
def wan() -> torch.nn.Module:
    """Wan 14B in half precision, without its weights."""
    with torch.device("meta"):
        size = {"ffn_dim": 13824, "num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128}
        return diffusers.WanTransformer3DModel(**size).bfloat16()


def test_room_for_keys_and_values_grows_with_the_model(wan: torch.nn.Module) -> None:
    """That of four prompts of 512 tokens, 400 MiB each, fits into what may be held."""
    blocks = TextBlocks.of(wan)
    assert blocks is not None
    assert architecture(blocks.shapes) == "wan-40"
    prompt = 512 * 2 * sum(d_out for d_out, _ in blocks.shapes.values())
    assert prompt == 400 << 20
    assert 4 * prompt <= room(wan) < 5 * prompt
    assert room(torch.nn.Linear(1, 1)) == 256 << 20


def test_what_layers_behind_an_embedding_cannot(wan: torch.nn.Module, tmp_path: Path) -> None:
    """One sentence each: no LoRA, no objective that is trained, no pass without the prompts."""
    blocks = TextBlocks.of(wan)
    assert blocks is not None
    up = {site: torch.ones(shape[0], 2) for site, shape in blocks.shapes.items()}
    delta = ConceptDelta.from_factors(Concept("star"), torch.eye(2, blocks.d_in), up, 0.5, {})
    delta = ConceptDelta.load(delta.save(tmp_path / "star.safetensors"))
    assert delta.architecture == "wan-40"
    with pytest.raises(SepMEError, match="no change of weights does the same"):
        export_lora([delta], tmp_path / "lora.safetensors")
    with pytest.raises(SepMEError, match="give the prompts' contexts"), KVProjector(blocks, Composition((delta,))).attached():
        pass
    planner = Planner(HashedEncoder(), book_of(2), OPTIONS, ORDINARY)
    with pytest.raises(SepMEError, match="through the whole model"):
        make_deltas(planner, ["star"], blocks, TrainOptions())
