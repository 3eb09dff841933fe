"""What overhead and toggling are measured on: the embedded model's UNet, one of Stable Diffusion 1.5's size, random deltas for both."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept
from ..delta.concept_delta import ConceptDelta
from ..errors import SepMEError
from ..model.families import CONTEXT
from ..model.layers import projections, text_layers, weight_of, weights
from ..model.patch import patched
from ..model.protocols import AttentionLayer

MODELS = ("demo", "sd15")
RANK = 8


@dataclass(frozen=True)
class Subject:
    """A UNet with the batch of one picture under classifier-free guidance.

    Attributes:
        context: ``(2, tokens, d_in)``, the empty prompt and the picture's.
        latents: ``(1, 4, h, w)``.
    """

    name: str
    unet: Any
    context: Tensor
    latents: Tensor

    @property
    def layers(self) -> dict[str, AttentionLayer]:
        """Cross-attention modules by canonical name."""
        return text_layers(self.unet)

    def sample(self, steps: int) -> Tensor:
        """Latents after a DDIM run with guidance 7.5: the denoising loop alone, neither text encoder nor VAE."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
        scheduler.set_timesteps(steps)
        x = self.latents
        for t in scheduler.timesteps:
            empty, prompt = self.step(x, t).chunk(2)
            x = scheduler.step(empty + 7.5 * (prompt - empty), t, x).prev_sample
        return x

    def step(self, x: Tensor, t: Any) -> Tensor:
        """One forward pass."""
        return self.unet(torch.cat([x, x]), t, encoder_hidden_states=self.context.clone()).sample

    def twin(self) -> Subject:
        """The same weights in modules of their own, to be changed by other means."""
        memo: dict[int, Any] = {id(p): p for p in (*self.unet.parameters(), *self.unet.buffers())}
        return Subject(self.name, copy.deepcopy(self.unet, memo), self.context, self.latents)


def subject(name: str) -> Subject:
    """``demo``: the embedded model; ``sd15``: a UNet of Stable Diffusion 1.5's size, random, in bfloat16, at 8 x 8 latents.

    Raises:
        SepMEError: another name.
    """
    if name not in MODELS:
        raise SepMEError(f"There is no model {name!r} to measure on; choose one of {', '.join(MODELS)}.")
    generator = torch.Generator().manual_seed(0)
    if name == "demo":
        from ..hosts.diffusers import DiffusersHost

        host = DiffusersHost.load("demo")
        return Subject(name, host.unet, host.encode(["", "a red star"]).context, host.latents([0]))
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280))
    unet = unet.to_empty(device="cpu").to(torch.bfloat16).requires_grad_(False).eval()
    for parameter in unet.parameters():
        parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(0.1)
    draw = [torch.randn(*shape, generator=generator).to(torch.bfloat16) for shape in ((2, 77, 768), (1, 4, 8, 8))]
    return Subject(name, unet, draw[0], draw[1])


def random_deltas(layers: Mapping[str, AttentionLayer], count: int) -> tuple[ConceptDelta, ...]:
    """Deltas of rank 8 with open gates: each touches every prompt that it is switched on for."""
    generator = torch.Generator().manual_seed(1)
    kv = weights(layers)
    d_in = next(iter(kv.values())).shape[1]
    deltas = []
    for i in range(count):
        down = torch.linalg.qr(torch.randn(d_in, RANK, generator=generator)).Q.T
        up = {name: 0.01 * torch.randn(len(weight), RANK, generator=generator) for name, weight in kv.items()}
        deltas.append(ConceptDelta.from_factors(Concept(f"concept {i}"), down, up, 0.0, {}))
    return tuple(deltas)


def random_edits(d_in: int, count: int) -> tuple[ConceptDelta, ...]:
    """The same as edits of the context."""
    generator = torch.Generator().manual_seed(1)
    deltas = []
    for i in range(count):
        down = torch.linalg.qr(torch.randn(d_in, RANK, generator=generator)).Q.T
        up = {CONTEXT: 0.01 * torch.randn(d_in, RANK, generator=generator)}
        deltas.append(ConceptDelta.from_factors(Concept(f"concept {i}"), down, up, 0.0, {}))
    return tuple(deltas)


def only(deltas: tuple[ConceptDelta, ...], changed: int) -> tuple[ConceptDelta, ...]:
    """The same behind gates that only the changed one's prompt opens, as when a prompt carries one concept of those loaded."""
    return tuple(d if i == changed % len(deltas) else replace(d, gate=2.0) for i, d in enumerate(deltas))  # a ratio is at most 1


def strengths(count: int, changed: float = 1.0) -> Tensor:
    """``(2, count)``: nothing for the empty prompt, all for the picture's; ``changed`` is the first concept's."""
    table = torch.zeros(2, count)
    table[1] = 1.0
    table[1, :1] = changed
    return table


@contextmanager
def barely_cached(layers: Mapping[str, AttentionLayer]) -> Iterator[None]:
    """The least that keeping can cost: every projection runs once and its result is returned without a check."""

    def wrap(name: str, module: nn.Module, forward: Any) -> Any:
        held: list[Tensor] = []

        def project(context: Tensor) -> Tensor:
            if not held:
                held.append(forward(context))
            return held[0]

        return project

    with patched(projections(layers), wrap):
        yield


def merge(unet: Any, deltas: tuple[ConceptDelta, ...]) -> None:
    """Add the deltas to the K/V weights, as a merged LoRA does; other weights stay shared."""
    for name, module in projections(text_layers(unet)).items():
        weight = weight_of(module)
        merged = weight.float() + sum(d.weight_delta(name) for d in deltas)
        module.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)


def add_adapters(unet: Any, deltas: tuple[ConceptDelta, ...]) -> None:
    """The deltas as unmerged PEFT adapters, one each, all active.

    Raises:
        SepMEError: peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise SepMEError("Comparing with PEFT's adapters needs peft; run: pip install peft.") from None
    for i, delta in enumerate(deltas):
        config = LoraConfig(r=delta.rank, lora_alpha=delta.rank, target_modules=r".*attn2\.(to_k|to_v)", init_lora_weights=False)
        unet.add_adapter(config, f"a{i}")
    unet.set_adapters([f"a{i}" for i in range(len(deltas))])
    unet.requires_grad_(False).to(unet.dtype)
    for name, module in projections(text_layers(unet)).items():
        adapted: Any = module
        for i, delta in enumerate(deltas):
            adapted.lora_A[f"a{i}"].weight.copy_(delta.down)
            adapted.lora_B[f"a{i}"].weight.copy_(delta.up_factor(name))
