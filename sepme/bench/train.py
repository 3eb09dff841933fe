"""A training step of ours against the published scheme written out plainly, on one UNet with random weights.

Published (arXiv 2402.05947 and its code): two copies of the model, four passes per step (two with a graph), w of the null space's
full width. Ours: one model, three passes (one with a graph), w of the concept's subspace.

Memory is the peak resident memory (Linux: VmHWM) of a process of its own for each side, less what the process held before it built
anything, so that weights, activations, gradients and optimiser state count and the libraries do not.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SepMEError
from ..model.layers import projections, text_layers, weights
from ..model.patch import Forward, patched
from ..model.protocols import AttentionLayer, Encoding
from ..plan.directions import EXACT_RTOL, concept_basis, null_basis
from ..train import TrainOptions
from ..train.increment import Increment
from ..train.loop import Training
from ..train.run import ConceptRun
from ..train.source import Draw, Images
from . import alternate

SIDES = ("ours", "published")


@dataclass(frozen=True)
class UNetSize:
    """UNet with ``channels`` by block and ``layers`` resnets per block, prompts ``(tokens, d_in)``, latents ``latent x latent``.

    ``known`` other prompts stand in A beside the empty one; ``rank`` is the cap on k.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    layers: int = 2
    latent: int = 32
    d_in: int = 768
    tokens: int = 77
    batch: int = 1
    known: int = 1
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.channels, self.layers, self.latent, self.d_in, self.tokens, self.batch, self.rank)
        if not self.channels or min(numbers) < 1 or self.known < 0 or any(c % 32 for c in self.channels):
            raise SepMEError("Every size must be above 0 and every number of channels a multiple of 32.")
        if self.latent % 2 ** (len(self.channels) - 1):
            raise SepMEError(
                f"{len(self.channels)} blocks halve the latent {len(self.channels) - 1} times; {self.latent} does not allow it."
            )
        if self.tokens * (self.known + 1) >= self.d_in:
            raise SepMEError("The known prompts fill the whole space of d_in dimensions; take fewer, or fewer tokens.")


class _Bare:
    """A UNet as a denoiser, with Stable Diffusion's noise schedule."""

    timesteps = 1000

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, self.timesteps) ** 2).cumprod(0)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=context).sample

    def attention_layers(self) -> dict[str, AttentionLayer]:
        return text_layers(self.unet)

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * x_0 + (1 - a).sqrt() * noise

    def trajectory(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class Published:
    """Eq. 2-11 written out plainly: teacher and student, four passes, ``ΔW = w (β Sp)ᵀ`` of full width; ΔW formed once per step."""

    def __init__(self, teacher: Any, null: Tensor, options: TrainOptions) -> None:
        self.teacher, self.student, self.options = teacher, copy.deepcopy(teacher), options
        self.modules = projections(text_layers(self.student))
        self.scaled = options.beta * null.float()
        kv = weights(text_layers(self.student))
        self.w = {name: nn.Parameter(torch.zeros(len(weight), null.shape[1])) for name, weight in kv.items()}
        self.optimizer = torch.optim.Adam(self.w.values(), lr=options.learning_rate)

    def step(self, draw: Draw, context: Tensor, empty: Tensor) -> float:
        """One training step; returns the loss."""
        deltas = {name: w @ self.scaled.T for name, w in self.w.items()}

        def wrap(name: str, module: Any, forward: Forward) -> Forward:
            return lambda c: F.linear(c, module.weight + deltas[name], module.bias)

        def epsilon(unet: Any, c: Tensor) -> Tensor:
            return unet(draw.x_t, draw.t, encoder_hidden_states=c).sample

        with torch.no_grad():
            original = epsilon(self.teacher, context) - epsilon(self.teacher, empty)
        with patched(self.modules, wrap):
            erased = epsilon(self.student, context) - epsilon(self.student, empty)
        loss = (erased * original).mean()
        norm = sum((w.abs().sum() for w in self.w.values()), torch.zeros(())) / len(self.w)
        self.optimizer.zero_grad()
        (loss + self.options.regularisation * norm).backward()
        self.optimizer.step()
        return float(loss.detach())


class Comparison:
    """Both sides on the same UNet, tokens and draws; each is built when it is first asked for."""

    def __init__(self, size: UNetSize) -> None:
        from diffusers import UNet2DConditionModel

        self.size = size
        torch.manual_seed(size.seed)
        blocks, last = len(size.channels), len(size.channels) - 1
        unet = UNet2DConditionModel(
            sample_size=size.latent, block_out_channels=size.channels, layers_per_block=size.layers,
            cross_attention_dim=size.d_in, attention_head_dim=8,
            down_block_types=tuple("DownBlock2D" if blocks > 1 and i == last else "CrossAttnDownBlock2D" for i in range(blocks)),
            up_block_types=tuple("UpBlock2D" if blocks > 1 and i == 0 else "CrossAttnUpBlock2D" for i in range(blocks)),
        )  # fmt: skip
        self.denoiser = _Bare(unet.requires_grad_(False).eval())
        generator = torch.Generator().manual_seed(size.seed)
        tokens = torch.randn(size.known + 2, size.tokens, size.d_in, generator=generator)
        self.context, self.empty = tokens[:1], tokens[1:2]
        self.null = null_basis(tokens[1:].flatten(0, 1), EXACT_RTOL)
        self.down = concept_basis(self.context.flatten(0, 1), self.null, size.rank, 1.0).T.float().contiguous()
        channels = unet.config.in_channels
        latents = torch.randn(8, channels, size.latent, size.latent, generator=generator)
        self.source = Images(latents, None, 1, self.denoiser)

    def ours(self) -> Callable[[], Any]:
        """A training step of this project."""
        options = TrainOptions(batch=self.size.batch, threshold=-1e9)
        increment = Increment.zeros(weights(self.denoiser.attention_layers()), self.down, options.beta)
        own, empty = self._encoding(self.context), self._encoding(self.empty)
        run = ConceptRun("bench", increment, self.source, own, empty, empty, options)
        return Training([run], self.denoiser, options).step

    @staticmethod
    def _encoding(context: Tensor) -> Encoding:
        return Encoding(context, torch.ones(context.shape[:2], dtype=torch.bool))

    def published(self) -> Callable[[], Any]:
        """A training step as published."""
        options = TrainOptions.for_mode("paper", batch=self.size.batch)
        side = Published(self.denoiser.unet, self.null, options)
        generator = torch.Generator().manual_seed(options.seed)
        shape = (self.size.batch, -1, -1)
        return lambda: side.step(self.source.draw(generator, self.size.batch), self.context.expand(shape), self.empty.expand(shape))


def resident(field: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak since it was started."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
    except (OSError, StopIteration):
        raise SepMEError("Memory is read from /proc/self/status, which only Linux has; run this benchmark on Linux.") from None


def _measure(side: str, size: UNetSize, steps: int) -> dict[str, int]:
    import diffusers.models.unets.unet_2d_condition  # noqa: F401  counted among the libraries

    before = resident("VmRSS")
    step = getattr(Comparison(size), side)()
    for _ in range(steps):
        step()
    return {"before": before, "peak": resident("VmHWM")}


def memory(side: str, size: UNetSize, steps: int = 3) -> dict[str, int]:
    """Bytes ``before`` building and at ``peak`` of one side after some steps, in a process of its own."""
    arguments = json.dumps({"side": side, "steps": steps, "threads": torch.get_num_threads(), "size": asdict(size)})
    done = subprocess.run([sys.executable, "-m", __name__, arguments], capture_output=True, text=True)
    if done.returncode:
        raise SepMEError(f"The memory run of {side} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(size: UNetSize | None = None, pairs: int = 7) -> dict[str, Any]:
    """Time and weigh a training step of both sides.

    Args:
        pairs: timed by turns after one untimed step each.

    Returns:
        ``train_step_speedup`` (median over pairs of published / ours, seconds), ``train_memory_ratio`` (ours / published, peak bytes),
        and what they were made of.
    """
    size = size or UNetSize()
    used = {side: memory(side, size) for side in SIDES}
    net = {side: used[side]["peak"] - used[side]["before"] for side in SIDES}
    bench = Comparison(size)
    ours, published = bench.ours(), bench.published()
    ours(), published()
    timing = alternate(published, ours, pairs)
    return {
        "train_step_speedup": timing.ratio,
        "train_memory_ratio": net["ours"] / net["published"],
        "seconds_ours": timing.second,
        "seconds_published": timing.first,
        "memory_ours": net["ours"],
        "memory_published": net["published"],
        "memory_peaks": used,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "size": asdict(size),
        "unet_parameters": sum(p.numel() for p in bench.denoiser.unet.parameters()),
        "width": {"ours": len(bench.down), "published": bench.null.shape[1]},
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    given["size"]["channels"] = tuple(given["size"]["channels"])
    print(json.dumps(_measure(given["side"], UNetSize(**given["size"]), given["steps"])))
