"""A short fine-tune that brings a concept back without meaning to."""

from __future__ import annotations

from statistics import fmean

import torch

from ..model.layers import projections, weight_of
from .attacks import target
from .erasers import Eraser
from .sampler import Sampler


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
                (out.float() - target(host, x_0[index], noise)).square().mean().backward()
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
