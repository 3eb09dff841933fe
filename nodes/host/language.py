"""ComfyUI's CLIP as text encoder where it is T5 or a language model: prompts of any length, templates, a model's own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...sepme.model.families import encoder_of
from ...sepme.model.protocols import Encoding
from ...sepme.plan.stored import StoredEncodings, StoredReader
from .jobs import check_interrupted

OTHERS = {"t5": "conditioning_mt5xl", "llama": "conditioning_llama3"}  # by the table's name of a text: its place in a CONDITIONING


def adapts(model: Any) -> bool:
    """Whether a loaded model (``patcher.model``) makes another context of the text encoder's before the first step, which is what can be
    edited (Anima)."""
    return hasattr(getattr(model, "diffusion_model", None), "preprocess_text_embeds")


def encoder_name(patcher: Any) -> str:
    """What makes the context that a MODEL reads, in words; empty where it is of no known family."""
    return encoder_of({name: tuple(weight.shape) for name, weight in patcher.model.diffusion_model.named_parameters()})


class LanguageEncoder:
    """Encodes prompts as CLIPTextEncode does, one by one, without weights: parentheses are plain text.

    The ordinary prompts that gates are calibrated on, and the shipped words, are read once and stored in ComfyUI's user folder: on a CPU
    they take minutes.

    Args:
        clip: a CLIP; its LoRAs are in effect.
        model: the MODEL that will read the contexts, if known; some (:func:`adapts`) make others of them first.
        text: where in a CONDITIONING the text stands that is read, and which of several there; the context if None.
    """

    free_length = True
    clip_skip = 0

    def __init__(self, clip: Any, model: Any = None, text: tuple[str, int | None] | None = None) -> None:
        self.text = text
        self.clip, self.name = clip, "" if model is None else encoder_name(model)
        self.model = model if model is not None and adapts(model.model) else None

    @cached_property
    def others(self) -> dict[str, LanguageEncoder]:
        """Of the texts that stand beside the context, by name."""
        found: dict[str, LanguageEncoder] = {}
        if self.text is None:
            facts = self._facts("")
            for name, key in OTHERS.items():
                shape = facts[key].shape if key in facts else ()
                which = [(name, None)] if len(shape) == 3 else [(f"{name}.{i}", i) for i in range(shape[1])] if shape else []
                found |= {text: LanguageEncoder(self.clip, text=(key, index)) for text, index in which}
        return found

    @cached_property
    def masked(self) -> bool:
        """Whether the model is told which tokens are there."""
        return self.model is None and "attention_mask" in self._facts("")

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """See :class:`~sepme.model.protocols.TextEncoder`."""
        return self._reader.encode(prompts)

    @cached_property
    def _reader(self) -> StoredReader:
        return StoredReader(StoredEncodings(Path(folder_paths.get_user_directory()) / "sepme" / "encodings"), self._read)

    def _read(self, prompt: str) -> Encoding:
        """One row, on the CPU in float32."""
        check_interrupted()
        with torch.inference_mode():
            facts = self._facts(prompt)
            context, pooled, mask = (facts.pop(key, None) for key in ("cond", "pooled_output", "attention_mask"))
            if self.text is not None:
                key, index = self.text
                context, pooled, mask = facts[key], None, None
                context = context if index is None else context[:, index]
            if self.model is not None:
                context, mask = _adapted(self.model, context, facts), None
        context = context[:1].to("cpu", torch.float32, copy=True)
        there = context.ne(0).any(dim=-1)
        if mask is not None and mask.shape[-1] == context.shape[1]:
            there &= mask.reshape(1, -1).cpu().bool()
            context *= there[..., None]  # the model does not read them
        return Encoding(context, there, None if pooled is None else pooled[:1].to("cpu", torch.float32, copy=True))

    def _facts(self, prompt: str) -> dict[str, Any]:
        """What CLIPTextEncode puts into a CONDITIONING."""
        plain = prompt.replace("(", "\\(").replace(")", "\\)")
        with torch.inference_mode():
            facts: dict[str, Any] = self.clip.encode_from_tokens(self.clip.tokenize(plain), return_pooled=True, return_dict=True)
        return facts


def readable(context: Tensor, mask: Tensor | None) -> Tensor:
    """A CONDITIONING's context ``(1, tokens, width)`` with zeros where its mask says that the model does not read it."""
    if mask is None or mask.shape[-1] != context.shape[1] or bool(mask.bool().all()):
        return context
    return context * mask.reshape(1, -1, 1).to(context)


def _adapted(patcher: Any, context: Tensor, facts: dict[str, Any]) -> Tensor:
    """The context as a MODEL's own adapter makes it of the text encoder's."""
    comfy.model_management.load_models_gpu([patcher])
    adapted: Tensor = patcher.model.extra_conds(cross_attn=context, device=patcher.load_device, **facts)["c_crossattn"].cond
    return adapted
