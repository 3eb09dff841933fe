"""Shared fixtures: a double world (encoder and denoiser) and a tiny real Stable Diffusion pipeline with random weights."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepme.concepts import Concept
from sepme.delta.concept_delta import ConceptDelta
from sepme.model.protocols import AttentionLayer, Encoding

# words of the tiny tokenizer: each is one token
WORDS = ("star", "circle", "heart", "moon", "tree", "house", "a", "of", "photo", "picture", "red", "blue", "big", "cat", "dog")


class TinyEncoder:
    """A text encoder double: random word vectors, mixed causally, so that later tokens (padding too) carry earlier words.

    A prompt's row does not depend on the batch it is in; token 0 is the same for all prompts.
    """

    def __init__(self, d_in: int = 48, tokens: int = 12, dtype: torch.dtype = torch.float32) -> None:
        self.d_in, self.tokens, self.dtype = d_in, tokens, dtype
        generator = torch.Generator().manual_seed(d_in)
        self.position = 0.3 * torch.randn(tokens, d_in, generator=generator)
        self.mix = torch.randn(d_in, d_in, generator=generator) / d_in**0.5
        self.gain = 1 + 0.1 * torch.randn(d_in, generator=generator)
        self.bias = 0.1 * torch.randn(d_in, generator=generator)
        self.calls: list[list[str]] = []

    def word(self, word: str) -> Tensor:
        return torch.randn(self.d_in, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))

    def encode(self, prompts: Sequence[str]) -> Encoding:
        self.calls.append(list(prompts))
        contexts, ends = [], []
        for prompt in prompts:
            words = re.findall(r"\w+", prompt.casefold())[: self.tokens - 2]
            texts = ["<start>", *words] + ["<end>"] * (self.tokens - 1 - len(words))
            x = torch.stack([self.word(t) for t in texts]) + self.position
            past = (x.cumsum(0) - x) / torch.arange(1, self.tokens + 1)[:, None] ** 0.5
            contexts.append(F.layer_norm(torch.tanh(x + past @ self.mix), (self.d_in,), self.gain, self.bias).to(self.dtype))
            ends.append(len(words) + 1)
        return Encoding(torch.stack(contexts), torch.arange(self.tokens)[None] <= torch.tensor(ends)[:, None])


class CrossAttention(nn.Module):
    """The four names that the library asks of an attn2 module."""

    def __init__(self, width: int, d_in: int, d_out: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_out = nn.Linear(width, d_out, bias=False), nn.Linear(d_out, width)
        self.to_k, self.to_v = nn.Linear(d_in, d_out, bias=False), nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyDenoiser(nn.Module):
    """A denoiser double: two cross-attention layers of different widths over ``(batch, 4, 4, 4)`` latents."""

    def __init__(self, d_in: int = 48, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter, self.leave = nn.Linear(5, 16), nn.Linear(16, 4)
            self.layers = nn.ModuleList([CrossAttention(16, d_in, 8), CrossAttention(16, d_in, 12)])
        self.requires_grad_(False)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        time = (t.float() / 1000).reshape(-1, 1, 1).expand(len(x_t), 16, 1)
        x = self.enter(torch.cat([x_t.flatten(2).transpose(1, 2), time], dim=-1))
        for layer in self.layers:
            x = layer(torch.tanh(x), context)
        return self.leave(x).transpose(1, 2).reshape(x_t.shape)

    def attention_layers(self) -> dict[str, AttentionLayer]:
        names = ("input_blocks.1.1.transformer_blocks.0.attn2", "middle_block.1.transformer_blocks.0.attn2")
        layers: Any = self.layers
        return dict(zip(names, layers, strict=True))

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        level = (t.float() / 1000).reshape(-1, 1, 1, 1)
        return (1 - level).sqrt() * x_0 + level.sqrt() * noise

    timesteps = 1000

    def sample(self, context: Tensor, empty: Tensor, generator: torch.Generator, *, on_step: Callable[[], None] | None = None) -> Tensor:
        return self.trajectory(context, empty, generator)[0][-1]

    def trajectory(
        self, context: Tensor, empty: Tensor, generator: torch.Generator, *, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        times = torch.tensor([801, 601, 401, 201, 1])
        x, points = torch.randn(len(context), 4, 4, 4, generator=generator), []
        for t in times:
            points.append(x)
            x = x - 0.2 * self.predict(x, t.expand(len(x)), context)
        return torch.stack(points), times


def tiny_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer in which each of WORDS is one token and other words fall into characters; prompts of 10 tokens."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(tokens))}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=10)


LONG = ("test_in_gradio", "comfyui/", "browser/", "demo/", "test_workers", "test_new_objective")  # begun in this order, before all others


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of pytest's workers one runs all tests of a module, so that no fixture is made twice, and none begins with a long one at the end."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: next((i for i, part in enumerate(LONG) if part in item.nodeid.partition("::")[0]), len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the command line keeps between its runs lies in a folder of the tests', that workers share."""
    shared = tmp_path_factory.getbasetemp().parent / "cache" if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPME_CACHE", str(shared))
        yield


@pytest.fixture(scope="session")
def world() -> SimpleNamespace:
    """The classes of the double world, and the words that the tiny pipeline knows."""
    return SimpleNamespace(Encoder=TinyEncoder, Denoiser=TinyDenoiser, CrossAttention=CrossAttention, words=WORDS)


@pytest.fixture(scope="session")
def make_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``make_host(dtype, heed)``: a fresh tiny Stable Diffusion pipeline (d_in 64, 10 tokens, 5 layers), always the same weights.

    Its random weights hardly heed the prompt; ``heed`` multiplies those of cross-attention.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sepme.hosts.diffusers import DiffusersHost

    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))

    def build(dtype: torch.dtype = torch.float32, heed: float = 1.0) -> DiffusersHost:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            text = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, projection_dim=64, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=10, initializer_factor=8.0, bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                )
            )  # fmt: skip
            unet = UNet2DConditionModel(
                sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=64, attention_head_dim=2,
            )  # fmt: skip
            vae = AutoencoderKL(
                block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=32,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
        with torch.no_grad():
            for name, module in unet.named_modules():
                if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                    module.weight.mul_(heed)
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
        parts = {"vae": vae.to(dtype), "text_encoder": text.to(dtype), "unet": unet.to(dtype), "tokenizer": tokenizer}
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return DiffusersHost(StableDiffusionPipeline(**parts, scheduler=scheduler, **extra))

    return build


@pytest.fixture(scope="session")
def host(make_host: Callable[..., Any]) -> Any:
    """The tiny pipeline, shared: tests leave it as they found it."""
    return make_host()


@pytest.fixture(scope="session")
def make_random_delta() -> Callable[..., ConceptDelta]:
    """``make_random_delta(name, shapes, rank, seed, gate, size)``: a delta with random orthonormal D and random Y."""

    def build(
        name: str, shapes: dict[str, tuple[int, int]], rank: int = 3, seed: int = 0, gate: float = 0.0, size: float = 1.0, **info: Any
    ) -> ConceptDelta:
        generator = torch.Generator().manual_seed(seed)
        d_in = next(iter(shapes.values()))[1]
        down = torch.linalg.qr(torch.randn(d_in, rank, generator=generator, dtype=torch.float64)).Q.T.float()
        up = {n: size * torch.randn(s[0], rank, generator=generator) for n, s in shapes.items()}
        return ConceptDelta.from_factors(Concept(name), down, up, gate, info)

    return build


@pytest.fixture(scope="session")
def shapes_of() -> Callable[[Any], dict[str, tuple[int, int]]]:
    """K/V shapes of a host's layers."""
    from sepme.model.layers import shapes

    return lambda denoiser: shapes(denoiser.attention_layers())
