"""Attempts to bring a concept back: learned soft prompts on the text side, and a short fine-tune."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import projections, weight_of
from .erasers import Eraser
from .prompt_sets import Batch
from .sampler import Sampler


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend.

    Attributes:
        concepts: how many are attacked (evenly spread).
        tokens: learned at once.
        steps, batch, learning_rate: of Adam.
        start: where the embeddings start: ``name`` (the concept's own words) or ``neutral`` (the word "a").
    """

    concepts: int = 2
    tokens: int = 4
    steps: int = 60
    batch: int = 8
    learning_rate: float = 0.02
    start: str = "neutral"


PLACEHOLDER = "a"


def attack(sampler: Sampler, eraser: Eraser | None, budget: Budget, gate: bool) -> float:
    """Share of pictures that show an erased concept again, sampled with a prompt of learned token embeddings.

    Textual inversion against the erased model: the embeddings of a few words are optimised through the text encoder, the gate and the
    erased denoiser, so that it predicts the noise on the stock model's pictures of the concept. They replace the words of a neutral
    prompt, which no filter knows. ``eraser`` None: the stock model, what the attack reaches at best.
    """
    names = sampler.suite.names
    stride = max(1, len(names) // budget.concepts)
    found = [_attack_one(sampler, eraser, name, budget, gate) for name in names[::stride][: budget.concepts]]
    return sum(found) / len(found)


def _attack_one(sampler: Sampler, eraser: Eraser | None, name: str, budget: Budget, gate: bool) -> float:
    host, erased = sampler.host, [name]
    prompt = " ".join([PLACEHOLDER] * budget.tokens)
    learned = [
        _start(encoder, tokenizer, name if budget.start == "name" else PLACEHOLDER, budget.tokens) for tokenizer, encoder in host.encoders
    ]
    optimizer = torch.optim.Adam(learned, lr=budget.learning_rate)
    x_0 = sampler.stock(sampler.sets.own(name)).latents.to(host.device)
    generator = torch.Generator().manual_seed(sampler.suite.seed + 7)
    with _soft(host, prompt, learned):
        for _ in range(budget.steps):
            sampler.check()
            index = torch.randint(len(x_0), (budget.batch,), generator=generator)
            t = torch.randint(host.timesteps, (budget.batch,), generator=generator).to(x_0.device)
            noise = torch.randn(x_0[index].shape, generator=generator).to(x_0)
            encoding = host.encode([prompt], grad=True)
            context = encoding.context.expand(budget.batch, -1, -1)
            pooled = None if encoding.pooled is None else encoding.pooled.expand(budget.batch, -1)
            with _acting(eraser, host, erased, gate):
                loss = (host.predict(host.noise(x_0[index], noise, t), t, context, pooled).float() - noise.float()).square().mean()
                for value, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                    value.grad = gradient
            optimizer.step()
        seeds = tuple(sampler.suite.seed + 70_000 + i for i in range(sampler.suite.images))
        batch = Batch((prompt,) * len(seeds), seeds, (name,) * len(seeds))
        return sampler.fresh(batch, eraser, erased, gate).accuracy


def _start(encoder: Any, tokenizer: Any, word: str, count: int) -> Tensor:
    """Embeddings ``(count, d)`` of a word's tokens, repeated."""
    ids = tokenizer(word).input_ids[1:-1]
    table = encoder.get_input_embeddings().weight
    return table[[ids[i % len(ids)] for i in range(count)]].detach().float().clone().requires_grad_(True)


@contextmanager
def _soft(host: Any, prompt: str, learned: Sequence[Tensor]) -> Iterator[None]:
    """Learned embeddings in place of the words of this prompt, and of no other, in every text encoder."""
    handles = []
    for (tokenizer, encoder), values in zip(host.encoders, learned, strict=True):
        ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids[0]

        def replace(module: nn.Module, args: Any, out: Tensor, ids: Tensor = ids, values: Tensor = values) -> Tensor:
            rows = (args[0] == ids.to(args[0].device)).all(-1)
            soft = torch.cat([out[:, :1], values.to(out)[None].expand(len(out), -1, -1), out[:, 1 + len(values) :]], dim=1)
            return torch.where(rows[:, None, None], soft, out)

        handles.append(encoder.get_input_embeddings().register_forward_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _acting(eraser: Eraser | None, host: Any, erased: Sequence[str], gate: bool) -> Iterator[None]:
    if eraser is None:
        yield
    else:
        with eraser.acting(host, erased, gate):
            yield


def resurgence(sampler: Sampler, eraser: Eraser, gate: bool, steps: int = 30, batch: int = 8, learning_rate: float = 1e-4) -> float:
    """Accuracy of concepts, each erased alone, after to_k and to_v were fine-tuned on unrelated pictures with everything erased.

    The pictures are the stock model's; the eraser stays on while W is trained and afterwards, as it is on a user's machine.
    """
    host, names = sampler.host, sampler.suite.names
    unrelated = sampler.sets.unrelated()
    x_0 = sampler.stock(unrelated).latents.to(host.device)
    context = host.encode(unrelated.prompts)
    modules = projections(host.attention_layers())
    before = {n: weight_of(m).detach().clone() for n, m in modules.items()}
    generator = torch.Generator().manual_seed(sampler.suite.seed + 9)
    try:
        with eraser.acting(host, names, gate):
            start = {n: weight_of(m).detach().clone() for n, m in modules.items()}
            optimizer = torch.optim.Adam([weight_of(m).requires_grad_(True) for m in modules.values()], lr=learning_rate)
            for _ in range(steps):
                sampler.check()
                index = torch.randint(len(x_0), (batch,), generator=generator)
                t = torch.randint(host.timesteps, (batch,), generator=generator).to(x_0.device)
                noise = torch.randn(x_0[index].shape, generator=generator).to(x_0)
                rows = context.rows(index)
                out = host.predict(host.noise(x_0[index], noise, t), t, rows.context, rows.pooled)
                (out.float() - noise.float()).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            learned = {n: weight_of(m).detach() - start[n] for n, m in modules.items()}
        for n, m in modules.items():
            weight_of(m).requires_grad_(False).copy_(before[n] + learned[n])
        return fmean(sampler.sample(sampler.sets.own(n), eraser, [n], gate).accuracy for n in names)
    finally:
        for n, m in modules.items():
            weight_of(m).requires_grad_(False).copy_(before[n])
            weight_of(m).grad = None
