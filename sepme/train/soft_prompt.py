"""A prompt whose words are learned embeddings (textual inversion), whatever for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..model.protocols import AttackHost, Encoding

PLACEHOLDER = "a"


class SoftPrompt:
    """Embeddings in place of the words of :attr:`prompt`, and of no other prompt, in every text encoder of a host.

    Args:
        word: whose embeddings it begins with.
        tokens: how many words.
    """

    def __init__(self, host: AttackHost, word: str, tokens: int) -> None:
        self.host, self.prompt = host, " ".join([PLACEHOLDER] * tokens)
        self.learned = [_start(encoder, tokenizer, word, tokens) for tokenizer, encoder in host.encoders]

    def learn(
        self,
        loss_of: Callable[[Encoding], Tensor],
        steps: int,
        rate: float,
        acting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Adam on a loss of the prompt's encoding; losses and gradients are computed inside of ``acting()``."""
        optimizer = torch.optim.Adam(self.learned, lr=rate)
        for _ in range(steps):
            with inserted(self.host, self.prompt, self.learned), acting():
                gradients = torch.autograd.grad(loss_of(self.host.encode([self.prompt], grad=True)), self.learned)
            for value, gradient in zip(self.learned, gradients, strict=True):
                value.grad = gradient
            optimizer.step()

    def encode(self) -> Encoding:
        """The prompt as it is now."""
        with torch.no_grad(), inserted(self.host, self.prompt, self.learned):
            return self.host.encode([self.prompt])


def _start(encoder: Any, tokenizer: Any, word: str, count: int) -> Tensor:
    """Embeddings ``(count, d)`` of a word's tokens, repeated."""
    ids = tokenizer(word).input_ids[1:-1]
    table = encoder.get_input_embeddings().weight
    return table[[ids[i % len(ids)] for i in range(count)]].detach().float().clone().requires_grad_(True)


@contextmanager
def inserted(host: AttackHost, prompt: str, embeddings: Sequence[Tensor]) -> Iterator[None]:
    """Embeddings ``(tokens, d)``, one of each text encoder, in place of the words of this prompt, and of no other."""
    handles = []
    for (tokenizer, encoder), values in zip(host.encoders, embeddings, strict=True):
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
