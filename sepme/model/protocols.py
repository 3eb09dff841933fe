"""What a host implements, and nothing more: a text encoder and a denoiser (and, for training on a folder, an image encoder)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .blocks import TextBlocks


class Encoding(NamedTuple):
    """Prompts as cross-attention reads them.

    Attributes:
        context: ``(prompts, tokens, d_in)`` in the encoder's dtype. Tokens that a prompt lacks beside longer ones are zero.
        mask: ``(prompts, tokens)`` bool, True up to and including the end token, False on padding.
        pooled: ``(prompts, d_pooled)`` or None.
    """

    context: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Any) -> Encoding:
        """The prompts at these indices."""
        return Encoding(self.context[index], self.mask[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: Any) -> Encoding:
        """The same on another device."""
        return Encoding(self.context.to(device), self.mask.to(device), None if self.pooled is None else self.pooled.to(device))


class TextEncoder(Protocol):
    """Turns prompts into what the denoiser reads."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """Encode prompts; all rows of the result have the same number of tokens."""
        ...


def free_length(encoder: object) -> bool:
    """Whether a prompt has as many tokens as it needs, by ``encoder.free_length`` of hosts that have such encoders (T5, language models);
    CLIP's fill chunks of 77."""
    return bool(getattr(encoder, "free_length", False))


def clip_skip(encoder: object) -> int:
    """How many of CLIP's last layers the user has skipped: ``encoder.clip_skip`` of hosts that let users do so, else 0."""
    return int(getattr(encoder, "clip_skip", 0))


def other_texts(encoder: object) -> Mapping[str, TextEncoder]:
    """Encoders of the texts that the model is given beside the context, by name: ``encoder.others`` of hosts whose models have such
    (HunyuanDiT's mT5, every layer of Llama in HiDream)."""
    found: Mapping[str, TextEncoder] = getattr(encoder, "others", {})
    return found


class AttentionLayer(Protocol):
    """A cross-attention module (attn2)."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    heads: int


class Denoiser(Protocol):
    """The frozen model as training and sampling need it."""

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        """Predicted noise ε, shape of ``x_t``; ``t`` is ``(batch,)`` int64, ``extra`` the prompts' pooled vectors ``(batch, d_pooled)``."""
        ...

    def attention_layers(self) -> Mapping[str, AttentionLayer] | TextBlocks:
        """Cross-attention modules by canonical (LDM) name, in the order of the forward pass; of other models than UNets their
        :class:`~sepme.model.blocks.TextBlocks`, or none where text and picture are mixed, so that only the context can be edited."""
        ...

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised latents ``x_t`` of clean latents at timesteps ``t``."""
        ...

    @property
    def timesteps(self) -> int:
        """Number of training timesteps; ``t`` lies in 0 .. timesteps − 1."""
        ...

    def trajectory(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Points of the frozen model's own denoising runs, one run a row of ``context``; ``on_step`` is called at every step.

        ``extra``: the pooled vectors of ``[empty; context]``, given where the text encoder has them.

        Returns:
            ``x_t (steps, batch, ...)`` and timesteps ``(steps,)``.
        """
        ...

    def sample(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        """Clean latents ``x_0 (batch, ...)`` of images that the frozen model draws, DDIM in 50 steps."""
        ...


class ImageEncoder(Protocol):
    """Turns pictures into latents, for training on pictures."""

    @property
    def image_size(self) -> int:
        """Width and height in pixels of the model's images."""
        ...

    def encode_images(self, images: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
        """Clean latents ``x_0 (n, ...)`` of images ``(n, 3, image_size, image_size)`` float32 in [-1, 1]."""
        ...


class EvaluationHost(TextEncoder, Denoiser, Protocol):
    """What ``sepme.evaluate`` needs: a model that draws finished pictures, erased or not."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        composition: Any = None,
        toggles: Any = None,
        *,
        negative: str = "",
        steps: int = ...,
        guidance: float = ...,
        gate: bool = True,
        latents_only: bool = False,
    ) -> Tensor:
        """Images ``(n, 3, height, width)`` in [-1, 1], or latents, one per prompt and seed.

        ``composition`` is a :class:`~sepme.Composition`, ``toggles`` strengths by concept; a picture that nothing touches has to be the
        same, bit for bit, as without them.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(n, 3, height, width)`` float32 in [-1, 1] of latents."""
        ...


class AttackHost(EvaluationHost, Protocol):
    """What the attacks of an evaluation need beside it: to reach into the text encoders.

    Attributes:
        encoders: tokenizer and text encoder in the manner of transformers, two of SDXL's.
    """

    encoders: Sequence[tuple[Any, Any]]

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Encoding:
        """As :meth:`TextEncoder.encode`, with ``grad`` differentiable by the encoders' embeddings."""
        ...
