"""Train the embedded model: ``python -m sepme.demo.train [vae|classifier|diffusion|export]`` (all, in that order, by default).

Seeded, resumable: every stage writes a checkpoint to ``--work`` each few hundred steps and goes on from it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from .world import PLAIN, STYLES, Scene, draw, random_scene

SCENES = 6144  # drawings in the pool that training draws from


def pool(seed: int, count: int) -> tuple[Tensor, list[Scene]]:
    """``count`` drawings as ``(count, 3, 64, 64)`` uint8 and their scenes."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [random_scene(generator) for _ in range(count)]
    images = torch.stack([(draw(s, generator) * 255).round().to(torch.uint8) for s in scenes])
    return images, scenes


def to_model(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class Stage:
    """A resumable optimisation: cosine learning rate, checkpoints, log lines."""

    def __init__(self, name: str, work: Path, modules: dict[str, torch.nn.Module], steps: int, lr: float, seed: int):
        self.path, self.name, self.modules, self.steps = work / f"{name}.pt", name, modules, steps
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min(1, (i + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / steps))))
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state[key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.generator.set_state(state["generator"])
            self.step = state["step"]

    def save(self) -> None:
        state = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        state |= {"generator": self.generator.get_state(), "step": self.step}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def __iter__(self) -> Iterator[int]:
        started = time.time()
        while self.step < self.steps:
            yield self.step
            self.step += 1
            if self.step % 200 == 0 or self.step == self.steps:
                self.save()
                print(f"{self.name} {self.step}/{self.steps}, {time.time() - started:.0f} s", flush=True)

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()

    def pick(self, count: int, batch: int) -> Tensor:
        return torch.randint(count, (batch,), generator=self.generator)


def train_vae(work: Path, steps: int = 1400, batch: int = 12) -> AutoencoderTiny:
    torch.manual_seed(1)
    vae = AutoencoderTiny().to(memory_format=torch.channels_last)
    stage = Stage("vae", work, {"vae": vae}, steps, 1.5e-3, seed=11)
    images, _ = pool(101, SCENES)
    for step in stage:
        x = to_model(images[stage.pick(len(images), batch)]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encoder(x)
            noisy = z + 0.08 * torch.randn(z.shape, generator=stage.generator)
            y = vae.decoder(noisy).float()
        z = z.float()
        shape = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        coarse = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        error = F.mse_loss(y, x)
        stage.update(F.l1_loss(y, x) + coarse + error + 0.02 * shape)
        if step % 50 == 0:
            print(f"vae step {step} mse {error.item():.4f} shape {shape.item():.4f}", flush=True)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["vae", "classifier", "diffusion", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/demo-model"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        globals()[f"train_{stage}"](arguments.work)


if __name__ == "__main__":
    main()
