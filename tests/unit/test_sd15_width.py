"""At SD 1.5's width, on tokens of a real (random, two-layer) CLIP-L: the context edit is the closed form of every layer."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sepme.apply.composition import Composition
from sepme.apply.projector import KVProjector
from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.model.families import CONTEXT
from sepme.model.layers import weights
from sepme.model.protocols import Encoding
from sepme.plan.planner import Planner
from sepme.train.increment import context_site
from sepme.train.objectives.closed_form import solve

WIDTH, TOKENS, END = 768, 77, 49407


class RandomClip:
    """CLIP-L's own shape and start and end tokens, two layers of it; a word is one token."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(15)
            config = CLIPTextConfig(
                vocab_size=END + 1, hidden_size=WIDTH, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12,
                hidden_act="quick_gelu", bos_token_id=END - 1, eos_token_id=END, pad_token_id=END,
            )  # fmt: skip
            self.model = CLIPTextModel(config).eval()
            nn.init.normal_(self.model.get_input_embeddings().weight, std=1.0)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoding:
        words = [[zlib.crc32(w.encode()) % (END - 1) for w in p.split()] for p in prompts]
        ids = torch.tensor([[END - 1, *w] + [END] * (TOKENS - 1 - len(w)) for w in words])
        ends = torch.tensor([len(w) + 1 for w in words])
        return Encoding(self.model(ids).last_hidden_state, torch.arange(TOKENS)[None] <= ends[:, None])


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.to_q = 8, nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(WIDTH, width, bias=False), nn.Linear(WIDTH, width, bias=False)


@pytest.fixture(scope="module")
def layers() -> dict[str, Attention]:
    torch.manual_seed(1)
    names = {f"input_blocks.{i}.1.transformer_blocks.0.attn2": d for i, d in ((1, 320), (4, 640), (7, 1280))}
    return {name: Attention(width) for name, width in names.items()}


def test_one_edit_of_the_context_is_the_closed_form_of_every_layer(layers: dict[str, Attention]) -> None:
    encoder = RandomClip()
    book = ConceptBook(
        (Concept("van gogh", ("van gogh", "a painting by van gogh"), "a painting"), Concept("monet", ("monet",))), ("a cat",)
    )
    planner = Planner(encoder, book, ordinary=("a red car", "two dogs", "a house by the sea", "rain"))
    plan = planner.plan("van gogh")
    tokens, target = planner.prompts.tokens("van gogh")
    kv = {n: w.double() for n, w in weights(layers).items()}
    per_layer = solve(kv, tokens, target, plan.down)
    edit = solve(context_site(WIDTH, torch.float64), tokens, target, plan.down)[CONTEXT]
    prompts = ["a painting by van gogh on a wall", "a cat", ""]
    context = encoder.encode(prompts).context.double()
    h = context @ plan.down.double().T
    for name, w in kv.items():  # in float64, before anything is stored
        one, other = (context + h @ edit.T) @ w.T, context @ w.T + h @ per_layer[name].T
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.abs().max()))
    made = [ConceptDelta.from_factors(plan.concept, plan.down, up, plan.gate, {}) for up in (per_layer, {CONTEXT: edit})]
    layered, whole = (Composition((d,)) for d in made)
    assert len(made[1].to_bytes()) < len(made[0].to_bytes()) / 2
    given = context.float()
    edited = whole.edit_context(given, torch.ones(1))
    assert torch.equal(edited[1:], given[1:])
    with KVProjector(layers, layered, backend="exact").attached():  # as a host has them, from what the files hold
        projected = {n: _project(layers, n, given) for n in kv}
    for name, there in projected.items():
        here, stock = _project(layers, name, edited), _project(layers, name, given)
        assert torch.equal(there[1:], stock[1:])
        assert torch.equal(here[1:], stock[1:])
        moved = float((there[0] - stock[0]).abs().max())
        assert moved > 0.01 * float(stock[0].abs().max())
        torch.testing.assert_close(here[0], there[0], rtol=0, atol=2e-3 * moved)  # both factors are stored in float16


@torch.no_grad()
def _project(layers: dict[str, Attention], name: str, context: Tensor) -> Tensor:
    layer, _, end = name.rpartition(".")
    out: Tensor = getattr(layers[layer], end)(context)
    return out
