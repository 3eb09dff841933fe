"""``sepme.erase``: concepts out of a diffusers pipeline that goes on being called as before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..apply.composition import Composition
from ..apply.toggles import strengths
from ..concepts import Concept
from ..errors import SepMEError
from ..model.encoder_fingerprint import PROBES
from ..model.families import clip_of_width
from ..model.protocols import Encoding
from ..model.words import WordTable, clip_words
from ..plan.stored import StoredEncodings, identity, worth_storing
from ..progress import OnProgress, silent
from ..train.erasures import Erasures

_made = Erasures()
MARK = "_sepme_erasure"


class PipelineEncoder:
    """The text encoders of a Stable Diffusion 1.x, 2.x or XL pipeline.

    Context as the UNet reads it: last states; of SDXL's two encoders the last but one, side by side, and the pooled vector.

    Args:
        cache: folder where encodings of the shipped prompts are kept, if anywhere.

    Attributes:
        name: in words, as the table of families has it; empty for encoders of unpublished width.
    """

    def __init__(self, pipe: Any, cache: Path | None = None) -> None:
        self.pipe = pipe
        self._store = None if cache is None else StoredEncodings(cache, exact=True)
        second = getattr(pipe, "text_encoder_2", None)
        self.encoders = [(pipe.tokenizer, pipe.text_encoder)] + ([(pipe.tokenizer_2, second)] if second is not None else [])
        self.name = clip_of_width(sum(encoder.config.hidden_size for _, encoder in self.encoders))

    def words(self) -> WordTable:
        """The first tokenizer's words."""
        tokenizer, encoder = self.encoders[0]
        return clip_words(tokenizer, encoder.get_input_embeddings().weight)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Encoding:
        """See :class:`~sepme.model.protocols.TextEncoder`; ``grad`` keeps the graph, for what is put in place of token embeddings."""
        if self._store is None or grad or not worth_storing(prompts):
            return self._read(prompts, grad)
        return self._store.made(self._read, identity(self._read(PROBES[:1])), prompts).to(self.pipe._execution_device)

    def _read(self, prompts: Sequence[str], grad: bool = False) -> Encoding:
        device, states, masks, pooled = self.pipe._execution_device, [], [], None
        for tokenizer, encoder in self.encoders:
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
            ).input_ids.to(device)
            ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
            masks.append(torch.arange(ids.shape[1], device=ids.device)[None] <= ends[:, None])
            with torch.set_grad_enabled(grad):
                out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2] if len(self.encoders) > 1 else out.last_hidden_state)
            pooled = getattr(out, "text_embeds", None)
        return Encoding(torch.cat(states, dim=-1), masks[0], pooled)


class Erasure:
    """Concepts erased from a pipeline; a context manager that gives them back at its end.

    Attributes:
        toggles: strength by name, to be changed at any time: 1 erases, 0 does nothing.
        composition: the deltas.
    """

    def __init__(self, pipe: Any, composition: Composition) -> None:
        self.composition = composition
        self.toggles = dict.fromkeys(composition.names, 1.0)
        self._pipe, self._inner = pipe, pipe.encode_prompt
        self._before = {k: v for k, v in vars(pipe).items() if k == "encode_prompt"}  # another library's, if any
        pipe.encode_prompt = self._encode_prompt
        setattr(pipe, MARK, self)

    def restore(self) -> None:
        """Take the erasure off the pipeline, which then is as it was; a second time does nothing."""
        if getattr(self._pipe, MARK, None) is self:
            delattr(self._pipe, MARK)
            del self._pipe.encode_prompt
            vars(self._pipe).update(self._before)

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own, its contexts (prompt, negative prompt) and pooled vectors (the same of SDXL) edited."""
        made = self._inner(*args, **kwargs)
        contexts, pooled = made[:2], made[2:]
        weights = strengths([self.toggles], self.composition.deltas)[0]
        edited = [c if c is None else self.composition.edit_context(c, weights) for c in contexts]
        replaced = [self._pooled(p, c, weights) for p, c in zip(pooled, contexts, strict=False)]
        return (*edited, *replaced)

    def _pooled(self, pooled: Tensor | None, context: Tensor | None, weights: Tensor) -> Tensor | None:
        if pooled is None or context is None or not any(d.pooled is not None for d in self.composition.deltas):
            return pooled
        return self.composition.replace_pooled(pooled, context, weights)

    def __enter__(self) -> Erasure:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def erase(pipe: Any, concepts: Sequence[str | Concept], preserve: Sequence[str] = (), on_progress: OnProgress = silent) -> Erasure:
    """Erase concepts from every picture of a diffusers pipeline, from its text encoders alone; its weights stay as they are.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline of any task. It is called as before.
        concepts: names, or :class:`Concept` with prompts and an anchor of one's own; planned together.
        preserve: prompts that must not change at all.

    Raises:
        SepMEError: another kind of pipeline, one that is erased from already, no concept, or one that cannot be erased.
    """
    if getattr(pipe, MARK, None) is not None:
        raise SepMEError("This pipeline has an erasure already; call its restore() first, and name all concepts at once.")
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    kinds = [str(getattr(getattr(e, "config", None), "model_type", "")) for e in encoders if e is not None]
    readable = getattr(pipe, "unet", None) is not None and kinds and all(kind.startswith("clip") for kind in kinds)
    if not readable or not callable(getattr(pipe, "encode_prompt", None)) or encoders[0] is None:
        raise SepMEError(
            f"sepme.erase takes complete pipelines of Stable Diffusion 1.x, 2.x and XL, not {type(pipe).__name__}; erase from one of those."
        )
    if isinstance(concepts, str) or not concepts:
        raise SepMEError('Concepts are a list of at least one name; write sepme.erase(pipe, ["van gogh"]).')
    return Erasure(pipe, Composition(_made.get(PipelineEncoder(pipe), concepts, preserve, on_progress=on_progress)))
