"""ComfyUI's models that are no UNets of Stable Diffusion as denoiser: called as its sampler calls them, one timestep at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.quant_ops
import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from ...sepme.errors import SepMEError
from ...sepme.model.blocks import TextBlocks
from ...sepme.model.layers import text_layers
from ...sepme.model.lengths import Part, parts
from ...sepme.model.schedule import Sampling, Schedule
from .denoiser import HostDenoiser, UNetDenoiser
from .language import LanguageEncoder
from .text import ClipEncoder

SIZE = 1024  # pixels of an image's side if nothing is said
RATIOS = {"Flux2": 16, "Wan22": 16, "HunyuanVideo15": 16, "LTXV": 32, "HunyuanImage21": 32}  # pixels a latent; older versions do not say


def denoiser_of(patcher: Any, encoder: ClipEncoder | LanguageEncoder, size: int = 0) -> HostDenoiser:
    """A MODEL as what trains and samples.

    Args:
        encoder: of the prompts that it will be given.
        size: pixels of an image's side; the model's own if 0.

    Raises:
        SepMEError: see :class:`UNetDenoiser` and :class:`TransformerDenoiser`.
    """
    return UNetDenoiser(patcher, size) if text_layers(patcher.model.diffusion_model) else TransformerDenoiser(patcher, encoder, size)


class TransformerDenoiser(HostDenoiser):
    """A model of any other family; ``t`` are places in the table of noise levels that ComfyUI's schedulers take theirs from, its shift
    included.

    Raises:
        SepMEError: what the model predicts is not known, it is given texts beside the context, or a size that it cannot draw.
    """

    def __init__(self, patcher: Any, encoder: ClipEncoder | LanguageEncoder, size: int = 0) -> None:
        super().__init__(patcher)
        if getattr(encoder, "others", None):
            raise SepMEError("This model is given other texts beside the context, which are erased by the objective closed-form alone.")
        sampling = patcher.get_model_object("model_sampling")
        if self.model.latent_format.latent_dimensions not in (2, 3):
            raise SepMEError("This model makes no pictures; choose the objective closed-form and the edit context, which do not ask.")
        self._flow, self._scaled = _kind(sampling)
        with torch.inference_mode(False), torch.no_grad():  # tensors that may take part in a graph
            self._sigmas = sampling.sigmas.detach().clone()
            a, s = (table.float() for table in self._levels(self._sigmas.double()))
            self.schedule = Schedule(a, s, "flow" if self._flow else "epsilon")
        format = self.model.latent_format
        self._ratio = getattr(format, "spacial_downscale_ratio", 0) or RATIOS.get(type(format).__name__, 8)
        self.side = (size or SIZE) // self._ratio
        if self.side < 1 or self.pixels != (size or SIZE):
            raise SepMEError(f"Images of this model have sides that are multiples of {self._ratio} pixels, not {size}.")
        empty = encoder.encode([""])
        self._least = empty.context.shape[1]
        self._masked = isinstance(encoder, LanguageEncoder) and encoder.masked and not bool(empty.mask.all())

    @property
    def pixels(self) -> int:
        return int(self._ratio * self.side)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        format = self.model.latent_format
        return (format.latent_channels, *([1] if format.latent_dimensions == 3 else []), self.side, self.side)

    def attention_layers(self) -> Any:
        return TextBlocks.of(self.model.diffusion_model) or {}

    def parts(self, context: Tensor, t: Tensor) -> list[Part]:
        return super().parts(context, t) if detect_fake_mode() else parts(context, self._least)

    def guided(self, sampling: Sampling) -> Sampling:
        given = getattr(getattr(self.model.diffusion_model, "params", None), "guidance_embed", False)
        return sampling._replace(guidance=1.0) if given else sampling

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """ComfyUI adds in place, to tensors that the way back needs, and has operators that know no way back.

        Where memory is counted (fake tensors), there are no numbers that would be lost.
        """
        graph, counting = torch.autograd.graph, detect_fake_mode() is not None
        management, kitchen = comfy.model_management, getattr(comfy.quant_ops, "ck", None)
        before, replaced = getattr(management, "in_training", None), _plain(kitchen)
        with graph.saved_tensors_hooks(_same, _same) if counting else graph.allow_mutation_on_saved_tensors():
            try:
                if before is not None:
                    management.in_training = True
                for name, plain in replaced.items():
                    replaced[name] = getattr(kitchen, name)
                    setattr(kitchen, name, plain)
                yield
            finally:
                if before is not None:
                    management.in_training = before
                for name, own in replaced.items():
                    setattr(kitchen, name, own)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """ε or the flow's velocity, of what ComfyUI makes of the model's output: ``D``, the clean latents that it foretells.

        In float64, where the device has it: D lies close to the latents where there is little noise, and nothing is lost.
        """
        precise = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
        sigma = self._sigmas.to(x.device)[t].to(precise)
        a, s = (level.reshape(-1, *[1] * (x.dim() - 1)) for level in self._levels(sigma))
        latents = x.to(precise)
        given = latents / a if self._scaled else latents
        clean = self.model.apply_model(given, sigma, transformer_options={}, **self._conds(x, context, extra))
        return ((latents - (1 if self._flow else a) * clean) / s).to(torch.promote_types(x.dtype, torch.float32))

    def _levels(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of ``x_t = a x_0 + s n`` at ComfyUI's noise levels, which are s, or s / a where the latents are scaled."""
        if not self._scaled:
            return 1 - sigma, sigma
        a = 1 / (1 + sigma) if self._flow else (1 + sigma.square()).rsqrt()
        return a, a * sigma

    def _conds(self, x: Tensor, context: Tensor, extra: Any) -> dict[str, Any]:
        """What ComfyUI's sampler calls the model with, of prompts of equal length."""
        facts: dict[str, Any] = {"cross_attn": context, "noise": x, "device": x.device, "width": self.pixels, "height": self.pixels}
        if extra is not None:
            facts["pooled_output"] = extra.to(x.device)
        if self._masked:
            facts["attention_mask"] = context.detach().ne(0).any(dim=-1).long()
        made = self.model.extra_conds(prompt_type="positive", **facts)
        return {name: cond.process_cond(batch_size=len(x), device=x.device, area=None).cond for name, cond in made.items()}


def _kind(sampling: Any) -> tuple[bool, bool]:
    """Whether a model predicts a flow, and whether it is given latents ``x_t / a``.

    Raises:
        SepMEError: it predicts something else.
    """
    known = comfy.model_sampling
    other = tuple(getattr(known, name) for name in ("X0", "EDM", "IMG_TO_IMG_FLOW") if hasattr(known, name))
    if not isinstance(sampling, other) and getattr(sampling, "noise_scale", 1.0) == 1:
        if isinstance(sampling, known.CONST):
            return True, False
        if isinstance(sampling, getattr(known, "COSMOS_RFLOW", ())):
            return True, True
        if isinstance(sampling, known.EPS) and isinstance(sampling, known.ModelSamplingDiscrete):
            return False, True
    raise SepMEError("What this model predicts is not known; choose the objective closed-form and the edit context, which do not ask.")


def _same(saved: Tensor) -> Tensor:
    return saved


def _plain(kitchen: Any) -> dict[str, Any]:
    """Functions of comfy-kitchen that know no way back and are called without asking whether one is needed, in plain PyTorch."""
    rope = getattr(getattr(getattr(kitchen, "backends", None), "eager", None), "rope", None)
    return {name: getattr(rope, name) for name in ("rms_rope_split_half",) if hasattr(kitchen, name) and hasattr(rope, name)}
