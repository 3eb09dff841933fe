"""The checkpoint in the UI as text encoder and denoiser, for training and verification."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from modules import devices, prompt_parser
from torch import Tensor, nn

from ....sepme.concepts import Concept
from ....sepme.delta.concept_delta import ConceptDelta
from ....sepme.errors import SepMEError
from ....sepme.model.encoder_fingerprint import EncoderFingerprint
from ....sepme.model.layers import latent_side, leave_inference_mode
from ....sepme.model.protocols import AttentionLayer, Encoding
from ....sepme.model.schedule import Schedule, ScheduledDenoiser
from .checkpoint import CHUNK, ClipSkip, attention_layers, chosen_model, crossattn, is_forge, load_forge, unet_of, use_clip_skip
from .interface import erasures

SIZES = 6 * 256  # what SDXL's vector holds behind the pooled text: six sizes
BATCH = 32  # prompts encoded at once


class LoadedModel(ScheduledDenoiser):
    """The checkpoint in the UI as :class:`~sepme.model.protocols.TextEncoder` and :class:`~sepme.model.protocols.Denoiser`.

    Raises:
        SepMEError: nothing is loaded, no Stable Diffusion UNet, or one that predicts neither ε nor v.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.unet = model, unet_of(model)
        self._layers = attention_layers(model)
        alphas, kind = _schedule(model)
        if kind not in ("epsilon", "v"):
            raise SepMEError(f"The loaded checkpoint predicts {kind}; SepME trains on those that predict noise or v.")
        self.schedule = Schedule.diffusion(alphas, "v_prediction" if kind == "v" else "epsilon")
        self.side = latent_side(self._layers) or getattr(self.unet, "image_size", 64)
        self._tail: Tensor | None = None
        self.clip_skip = ClipSkip(model).clip_skip

    @property
    def _weight(self) -> Tensor:
        return next(iter(self._layers.values())).to_q.weight  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the UNet runs."""
        return torch.device(self._weight.device if is_forge(self.model) else devices.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's weights."""
        return self._weight.dtype

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (4, self.side, self.side)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """As the host reads prompts, with brackets as plain characters."""
        texts = ["".join(f"\\{c}" if c in "()[]\\" else c for c in p) for p in prompts]
        parts = [row for group in self._groups(texts) for row in self._encode(group)]
        tokens = max(len(c) for c, _, _ in parts)
        contexts = [c.repeat(tokens // len(c), 1) for c, _, _ in parts]
        masks = [m.repeat(tokens // len(m)) for _, m, _ in parts]
        pooled = [v[:-SIZES] for _, _, v in parts if v is not None]
        return Encoding(torch.stack(contexts), torch.stack(masks), torch.stack(pooled) if pooled else None)

    def _groups(self, texts: Sequence[str]) -> Iterator[list[tuple[str, int]]]:
        """Consecutive prompts with their lengths, several of one chunk each or a longer one by itself."""
        group: list[tuple[str, int]] = []
        for text in texts:
            length = self._length(text)
            if group and (length > CHUNK - 2 or group[0][1] > CHUNK - 2 or len(group) == BATCH):
                yield group
                group = []
            group.append((text, length))
        if group:
            yield group

    def _encode(self, group: Sequence[tuple[str, int]]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Context ``(tokens, d_in)``, mask ``(tokens,)`` and SDXL's vector of each prompt."""
        batch = prompt_parser.SdConditioning([text for text, _ in group], width=8 * self.side, height=8 * self.side)
        with torch.no_grad(), devices.autocast():
            cond = self.model.get_learned_conditioning(batch)
        contexts = crossattn(cond).clone()  # no inference tensors leave
        vectors = [v.clone() for v in cond["vector"]] if isinstance(cond, Mapping) else [None] * len(group)
        if vectors[0] is not None:
            self._tail = vectors[0][-SIZES:]
        masks = [_mask(contexts.shape[1], length) for _, length in group]
        return list(zip(contexts, masks, vectors, strict=True))

    def _length(self, text: str) -> int:
        """Tokens of a prompt without start and end."""
        if hasattr(self.model, "get_prompt_lengths_on_ui"):
            return int(self.model.get_prompt_lengths_on_ui(text)[0])
        from modules import sd_hijack

        count = sd_hijack.model_hijack.get_prompt_lengths
        more = (self.model.cond_stage_model,) if "cond_stage_model" in inspect.signature(count).parameters else ()  # reForge
        return int(count(text, *more)[0])

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return dict(self._layers)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """Through the module at which Automatic1111 moves models to the device."""
        y = None
        if extra is not None and self._tail is not None:
            y = torch.cat([extra, self._tail.to(extra).expand(len(extra), -1)], dim=1).to(self.device, self.dtype)
        if is_forge(self.model):
            with torch.autograd.graph.saved_tensors_hooks(_copied, lambda saved: saved):
                return self.unet(x, t, context=context, transformer_options={}, **({} if y is None else {"y": y}))
        with devices.autocast():
            if y is None:
                return self.model.model(x, t, c_crossattn=[context])
            return self.model.model(x, t, {"crossattn": context, "vector": y})


def _copied(saved: Tensor) -> Tensor:
    """What the backward pass keeps: Forge's UNets add in place, to tensors that it needs; weights, and views of them, stay as they are."""
    return saved if isinstance(saved, nn.Parameter) or isinstance(saved._base, nn.Parameter) else saved.clone()


def _mask(tokens: int, length: int) -> Tensor:
    """True up to and including the end token of each chunk of start, up to 75 tokens, end, padding."""
    inner = CHUNK - 2
    counts = [min(max(length - inner * i, 0), inner) for i in range(max(tokens // CHUNK, 1))]
    size = tokens // len(counts)
    return torch.cat([torch.arange(size) <= count + 1 for count in counts])


def _schedule(model: Any) -> tuple[Tensor, str]:
    """``ᾱ_t`` ``(timesteps,)`` float32, and what the model predicts."""
    if not is_forge(model):
        return model.alphas_cumprod.detach().float().cpu(), "v" if getattr(model, "parameterization", "eps") == "v" else "epsilon"
    whole = model.forge_objects.unet.model
    predictor = getattr(whole, "predictor", None) or whole.model_sampling  # Forge; reForge
    kind = getattr(predictor, "prediction_type", None)
    if kind is None:
        bases = {c.__name__ for c in type(predictor).__mro__}
        kind = "v" if "V_PREDICTION" in bases else "epsilon" if "EPS" in bases else type(predictor).__name__
    return 1 / (predictor.sigmas.detach().float().cpu().clone().square() + 1), {"v_prediction": "v", "eps": "epsilon"}.get(kind, kind)


_fingerprints: WeakKeyDictionary[Any, tuple[Any, EncoderFingerprint]] = WeakKeyDictionary()  # of a model, for a file and a clip skip


def encoder_fingerprint(model: Any) -> EncoderFingerprint:
    """Of the text encoder of the checkpoint in the UI as it is set; read once.

    Raises:
        SepMEError: see :class:`LoadedModel`.
    """
    loaded = LoadedModel(model)
    state = (model.sd_checkpoint_info.filename, loaded.clip_skip)
    known = _fingerprints.get(model)
    if known is None or known[0] != state:
        if is_forge(model):
            use_clip_skip(model)
        known = _fingerprints[model] = state, EncoderFingerprint.of(loaded)
    return known[1]


def erased(model: Any, names: Sequence[str], known: Sequence[Concept]) -> tuple[ConceptDelta, ...]:
    """Deltas of concepts that are only named, made with the text encoder of the checkpoint in the UI on first use.

    Args:
        known: concepts that others erase already.

    Raises:
        SepMEError: see :class:`LoadedModel` and :meth:`~sepme.train.erasures.Erasures.get`.
    """
    loaded = LoadedModel(model)
    if is_forge(model):
        use_clip_skip(model)
    with torch.no_grad():
        return erasures.get(loaded, names, known=known)


@contextmanager
def loaded_model() -> Iterator[LoadedModel]:
    """The model in the UI, whole on its device and with gradients possible, for as long as the block runs.

    Raises:
        SepMEError: see :class:`LoadedModel`.
    """
    model = chosen_model()
    attention_layers(model)  # before anything is moved
    if is_forge(model):
        model.forge_objects = model.forge_objects_original.shallow_copy()
        load_forge(model.forge_objects.unet, torch.zeros(4, 4, 128, 128))
        leave_inference_mode(unet_of(model))
        use_clip_skip(model)
    with torch.inference_mode(False), torch.enable_grad(), _no_checkpointing(model):
        loaded = LoadedModel(model)
        asked = [weight for weight in loaded.unet.parameters() if weight.requires_grad]
        try:
            for parameter in asked:
                parameter.requires_grad_(False)
            yield loaded
        finally:
            for parameter in asked:
                parameter.requires_grad_(True)


@contextmanager
def _no_checkpointing(model: Any) -> Iterator[None]:
    """Automatic1111 recomputes UNet blocks in the backward pass, which loses gradients of what is patched into them."""
    if is_forge(model):
        yield
        return
    from modules import sd_hijack_checkpoint

    names = ("checkpoint", "use_checkpoint")  # of transformer blocks, of resnets
    flags = [(m, name) for m in unet_of(model).modules() for name in names if getattr(m, name, None) is True]
    was_on = bool(sd_hijack_checkpoint.stored)
    sd_hijack_checkpoint.remove()
    try:
        for module, name in flags:
            setattr(module, name, False)
        yield
    finally:
        for module, name in flags:
            setattr(module, name, True)
        if was_on:
            sd_hijack_checkpoint.add()
