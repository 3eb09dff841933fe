"""A tiny real model of a family, and what can be seen from outside of where it reads text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Texts = Mapping[str, Tensor]
ROWS, TOKENS, WIDTH = 2, 5, 24


@dataclass(frozen=True)
class Tiny:
    """A model with seeded weights.

    Attributes:
        call: ``(x, t, texts)`` to the prediction; ``x (rows, *image)``, ``t (rows,)`` in 0 .. 1, ``texts`` by group ``(rows, *shape)``.
        image: shape of one picture's latents. texts: shape of one prompt's text by group.
    """

    model: nn.Module
    call: Callable[[Tensor, Tensor, Texts], Any]
    image: tuple[int, ...]
    texts: Mapping[str, tuple[int, ...]]

    @property
    def dtype(self) -> torch.dtype:
        """That of most weights."""
        return Counter(p.dtype for p in self.model.parameters()).most_common(1)[0][0]

    def draw(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Texts of so many prompts, all different."""
        return {g: noise((rows, *shape), seed + 7 * i).to(self.dtype) for i, (g, shape) in enumerate(sorted(self.texts.items()))}

    def predict(self, texts: Texts, image: int = 0, t: float = 0.9) -> Tensor:
        """The prediction for the prompts, every one for the same picture."""
        rows = len(next(iter(texts.values())))
        x = noise(self.image, image).to(self.dtype).expand(rows, *self.image).contiguous()
        with torch.no_grad():
            out = self.call(x, torch.full((rows,), t, dtype=self.dtype), texts)
        return out if isinstance(out, Tensor) else torch.stack(list(out))


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module) -> nn.Module:
    """All weights from one seed, norms about 1, so that everything that is read shows in what comes out."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        value = torch.randn(weight.shape, generator=generator) * (0.1 if weight.dim() < 2 else min(0.3, weight[0].numel() ** -0.5))
        weight.data = (value + (weight.dim() < 2 and "norm" in name and name.endswith(("weight", "scale")))).to(weight.dtype)
    for name, buffer in model.named_buffers():
        if name == "pos_embed":  # read from the checkpoint as well
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.eval().requires_grad_(False)


def seen(tiny: Tiny, texts: Texts, image: int = 0, t: float = 0.9) -> dict[str, list[Tensor]]:
    """What every linear layer got in one call, by name."""
    inputs: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Linear) -> Any:
        return module.register_forward_pre_hook(lambda _, args: inputs.setdefault(name, []).append(args[0].detach().clone()))

    handles = [watch(name, module) for name, module in tiny.model.named_modules() if isinstance(module, nn.Linear)]
    try:
        tiny.predict(texts, image, t)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def text_projections(tiny: Tiny) -> dict[str, set[str]]:
    """Linear layers that see text and nothing else, and the groups of texts that each sees.

    Their inputs are the same bits for another picture and another timestep, and others for another text.
    """
    texts, other = tiny.draw(ROWS, 10), tiny.draw(ROWS, 500)
    first = seen(tiny, texts)
    others = [seen(tiny, texts, image, t) for image, t in ((1, 0.9), (0, 0.3), (1, 0.3))]
    free = {name for name, read in first.items() if all(_same(read, found.get(name, [])) for found in others)}
    found: dict[str, set[str]] = {}
    for group in texts:
        changed = seen(tiny, {**texts, group: other[group]})
        for name in free:
            if not _same(first[name], changed.get(name, [])):
                found.setdefault(name, set()).add(group)
    return found


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
