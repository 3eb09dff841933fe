"""T5 and language models as text encoder, without a denoiser: prompts as a family of models reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.families import CONTEXT, Family
from ..model.protocols import Encoding
from ..plan.stored import StoredEncodings, StoredReader

Tokenizer = Callable[[str], list[int]]


class FamilyEncoder:
    """Encodes prompts one by one as a family's :class:`~sepme.model.families.Reading` says.

    Args:
        family: whose context is read; it has a reading.
        tokenizer: ids of a text with the tokens that the tokenizer itself puts around it.
        model: the encoder, of the transformers library.
        pooled: CLIP's vector of a prompt ``(1, d_pooled)``, of families that are given one beside the context.
        cache: folder where encodings of the shipped prompts are kept, if anywhere.
    """

    free_length = True
    clip_skip = 0

    def __init__(
        self,
        family: Family,
        tokenizer: Tokenizer,
        model: nn.Module,
        pooled: Callable[[str], Tensor] | None = None,
        cache: Path | None = None,
    ) -> None:
        text = family.texts[CONTEXT]
        assert text.reading is not None
        self.name, self._reading, self._tokenizer, self._model, self._pooled = text.encoder, text.reading, tokenizer, model, pooled
        before = self._reading.template.partition("{}")[0]
        self._cut = len(tokenizer(before)) if self._reading.cut else 0
        self._reader = StoredReader(None if cache is None else StoredEncodings(cache), self._read)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """See :class:`~sepme.model.protocols.TextEncoder`; on the CPU in float32."""
        return self._reader.encode(prompts)

    @torch.no_grad()
    def _read(self, prompt: str) -> Encoding:
        ids = self._tokenizer(self._reading.template.replace("{}", prompt))
        filled = max(0, self._reading.least - len(ids))
        there = torch.tensor([[True] * len(ids) + [not self._reading.hidden] * filled])
        given: dict[str, Any] = {"input_ids": torch.tensor([ids + [self._reading.pad] * filled]), "attention_mask": there.long()}
        some = next(self._model.parameters())
        out = self._model(**{name: value.to(some.device) for name, value in given.items()}, output_hidden_states=True)
        states = [out.last_hidden_state if i == -1 else out.hidden_states[i] for i in self._reading.states]
        context = (torch.cat(states, dim=-1).to("cpu", torch.float32) * there[..., None])[:, self._cut :].clone()
        pooled = None if self._pooled is None else self._pooled(prompt).to("cpu", torch.float32)
        return Encoding(context, there[:, self._cut :], pooled)
