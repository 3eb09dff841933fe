"""ComfyUI's CLIP as text encoder: that of Stable Diffusion, whose prompts fill chunks of 77 tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...sepme.errors import SepMEError
from ...sepme.model.encoder_fingerprint import PROBES
from ...sepme.model.protocols import Encoding
from ...sepme.plan.gate import ordinary_prompts
from .jobs import check_interrupted
from .language import LanguageEncoder, encoder_name

BATCH = 8  # prompts encoded between two looks at the interrupt button; a CPU is no faster with more

CLIPS = {"l", "g", "h"}  # ComfyUI's names of CLIP-L, OpenCLIP-G and OpenCLIP-H
NO_ENCODER = "There is no text encoder here; load a checkpoint that has one, or CLIP with a loader of its own."

Tokens = dict[str, list[list[tuple[Any, ...]]]]  # by encoder: 77-token chunks of (id, weight)

# Ordinary prompts, and those of its fingerprint, as a text encoder reads them with these patches and this clip skip, for as long as it
# lives: every training and every verification needs them, and a CPU takes a minute.
_ORDINARY: WeakKeyDictionary[Any, tuple[Any, dict[tuple[str, ...], Encoding]]] = WeakKeyDictionary()


def clip_skip(clip: Any) -> int:
    """See :attr:`ClipEncoder.clip_skip`; 0 where it cannot be told."""
    asked = clip.layer_idx
    model = clip.cond_stage_model
    encoder = getattr(model, str(getattr(model, "clip", "")), None) or getattr(model, "clip_l", None) or getattr(model, "clip_g", None)
    own = getattr(encoder, "options_default", ("last", None))[:2]
    last = -1 if own[0] == "last" or own[1] is None else own[1]
    if asked is None or abs(asked) > getattr(encoder, "num_layers", 99):  # ComfyUI takes the last layer then
        asked = last if asked is None else -1
    return int(last - asked)


def conditioning(clip: Any, text: str) -> Any:
    """CONDITIONING of a prompt, as CLIPTextEncode makes it.

    Raises:
        SepMEError: there is no text encoder.
    """
    if clip is None:
        raise SepMEError(NO_ENCODER)
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def text_encoder(clip: Any, model: Any = None) -> ClipEncoder | LanguageEncoder:
    """A CLIP as text encoder.

    Args:
        model: the MODEL that will read its contexts, if known; its family names the encoder, and some make other contexts of them first.

    Raises:
        SepMEError: there is none; or it makes no text that can be edited.
    """
    if clip is None:
        raise SepMEError(NO_ENCODER)
    if set(clip.tokenize("")) <= CLIPS:
        return ClipEncoder(clip, "" if model is None else encoder_name(model))
    return LanguageEncoder(clip, model)


class ClipEncoder:
    """Encodes prompts as CLIPTextEncode does, without weights: parentheses are plain text.

    Args:
        clip: a CLIP of SD1.x, SD2.x or SDXL; its LoRAs and clip skip are in effect.
        name: of the text encoder, as the table of families calls it.

    Raises:
        SepMEError: there is none.
    """

    def __init__(self, clip: Any, name: str = "") -> None:
        if clip is None:
            raise SepMEError(NO_ENCODER)
        self.clip, self.name = clip, name
        self.has_pooled = "g" in self._tokens("")  # SDXL; other UNets do not read the pooled vector

    @property
    def clip_skip(self) -> int:
        """How many more of the last layers are skipped than this kind of encoder skips by itself (SDXL's skips one)."""
        return clip_skip(self.clip)

    def _tokens(self, prompt: str) -> Tokens:
        tokens: Tokens = self.clip.tokenize(prompt, disable_weights=True)
        return tokens

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """See :class:`~sepme.model.protocols.TextEncoder`; prompts of fewer chunks are repeated to a common length, as ComfyUI does."""
        cache, asked = self._cache(), tuple(prompts)
        if asked not in cache:
            encoding = self._read(asked)
            if asked != PROBES and not set(ordinary_prompts()).issuperset(asked):
                return encoding
            cache[asked] = encoding
        return cache[asked]

    def _cache(self) -> dict[tuple[str, ...], Encoding]:
        """By whole lists: a row's last bits depend on the rows that it is read with."""
        state = (self.clip.patcher.patches_uuid, self.clip.layer_idx)
        known = _ORDINARY.get(self.clip.cond_stage_model)
        if known is None or known[0] != state:
            known = _ORDINARY[self.clip.cond_stage_model] = (state, {})
        return known[1]

    def _read(self, prompts: tuple[str, ...]) -> Encoding:
        tokens = [self._tokens(p) for p in prompts]
        with torch.inference_mode():
            rows = [row for part in self._groups(tokens) for row in self._encode(part)]
        length = math.lcm(*(c.shape[0] for c, _ in rows))
        masks = [self._mask(t) for t in tokens]
        return Encoding(
            torch.stack([c.repeat(length // len(c), 1) for c, _ in rows]).clone(),  # cloned: nothing made for inference leaves
            torch.stack([m.repeat(length // len(m)) for m in masks]),
            torch.stack([p for _, p in rows if p is not None]).clone() if self.has_pooled else None,
        )

    def _groups(self, tokens: list[Tokens]) -> Iterator[list[Tokens]]:
        """Consecutive prompts that can be encoded at once: of one chunk each."""
        group: list[Tokens] = []
        for one in tokens:
            single = all(len(chunks) == 1 for chunks in one.values())
            if group and (not single or len(group) == BATCH):
                yield group
                group = []
            group.append(one)
            if not single:
                yield group
                group = []
        if group:
            yield group

    def _encode(self, group: list[Tokens]) -> list[tuple[Tensor, Tensor | None]]:
        """Context ``(tokens, d_in)`` and pooled vector of each prompt: several short prompts go as the chunks of one long prompt.

        Of a long prompt ComfyUI hands out the first chunk's pooled vector only, so those of all chunks are caught on their way.
        """
        check_interrupted()
        joined = {key: [chunk for one in group for chunk in one[key]] for key in group[0]}
        if not self.has_pooled:
            return [(c, None) for c in self.clip.encode_from_tokens(joined)[0].chunk(len(group))]
        caught: list[Tensor] = []
        hook = self.clip.cond_stage_model.clip_g.register_forward_hook(lambda *call: caught.append(call[-1][1]))
        try:
            context = self.clip.encode_from_tokens(joined)[0]
        finally:
            hook.remove()
        pooled = caught[0].to(context.device)  # by chunk; of several chunks of one prompt the first counts
        return list(zip(context.chunk(len(group)), pooled, strict=False))

    def _mask(self, tokens: Tokens) -> Tensor:
        """True up to and including the end token of each chunk; a chunk's padding repeats its end token or is 0."""
        chunks = next(iter(tokens.values()))
        end = next(iter(self._tokens("").values()))[0][1][0]
        masks = []
        for chunk in chunks:
            ends = [i for i, entry in enumerate(chunk) if isinstance(entry[0], int) and entry[0] == end]
            masks.append(torch.arange(len(chunk)) <= (ends[0] if ends else len(chunk)))
        return torch.cat(masks)
