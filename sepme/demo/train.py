"""Train the embedded model: ``python -m sepme.demo.train [vae|classifier|diffusion|export]`` (all, in that order, by default).

Seeded, resumable: every stage writes a checkpoint to ``--work`` each few hundred steps and goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .classifier import Classifier
from .world import (
    BOTH_PROMPTS,
    COLOUR_NAMES,
    FILLER,
    OBJECT_PROMPTS,
    OBJECTS,
    STYLE_PROMPTS,
    STYLES,
    Scene,
    draw,
    random_caption,
    random_scene,
)

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
        state: dict[str, object] = {key: module.state_dict() for key, module in self.modules.items()}
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


def train_vae(work: Path, steps: int = 1300, batch: int = 12) -> AutoencoderTiny:
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


def labels_of(scenes: list[Scene]) -> Tensor:
    """Class indices ``(n, 3)`` of scenes."""
    return torch.tensor([[s.object, s.style, s.colour] for s in scenes])


def train_classifier(work: Path, steps: int = 300, batch: int = 64) -> Classifier:
    torch.manual_seed(2)
    model = Classifier()
    stage = Stage("classifier", work, {"classifier": model}, steps, 2e-3, seed=12)
    images, scenes = pool(102, SCENES)
    labels = labels_of(scenes)
    for step in stage:
        index = stage.pick(len(images), batch)
        x = to_model(images[index])
        # generated pictures are softer and noisier than drawn ones
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        mix = torch.rand(batch, 1, 1, 1, generator=stage.generator)
        noise = torch.rand(batch, 1, 1, 1, generator=stage.generator) * 0.15
        x = x + mix * (blurred - x) + noise * torch.randn(x.shape, generator=stage.generator)
        loss = model.loss(x, labels[index])
        stage.update(loss)
        if step % 100 == 0:
            print(f"classifier step {step} loss {loss.item():.4f}", flush=True)
    return model.eval().requires_grad_(False)


def build_tokenizer(folder: Path, corpus: Path = Path(__file__).parents[1] / "data" / "ordinary_prompts.txt") -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges know the world's words; other words fall into smaller pieces."""
    words = [w for name in (*OBJECTS, *STYLES, *COLOUR_NAMES) for w in (name,)]
    texts = [*OBJECT_PROMPTS, *STYLE_PROMPTS, *BOTH_PROMPTS, *FILLER, "an"] * 50 + words * 200
    texts += corpus.read_text(encoding="utf-8").split("\n")
    trained = CLIPTokenizer().train_new_from_iterator(iter(texts), vocab_size=1100, show_progress=False)
    merges = [tuple(m) for m in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, word
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=384, projection_dim=192,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=192, attention_head_dim=4,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def latent_pool(work: Path, each: int = 40) -> Tensor:
    """Latents of drawings of every scene: ``(objects, styles + 1, colours, each, 4, 8, 8)``."""
    path = work / "latents.pt"
    if not path.exists():
        vae = load_stage(AutoencoderTiny(), work, "vae").to(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(103)
        shape = (len(OBJECTS), len(STYLES) + 1, len(COLOUR_NAMES))
        latents = []
        for o, s, c in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
            images = torch.stack([draw(Scene(o, s, c), generator) for _ in range(each)]) * 2 - 1
            with torch.no_grad():
                latents.append(vae.encoder(images.to(memory_format=torch.channels_last)).contiguous())
        torch.save(torch.stack(latents).reshape(*shape, each, 4, 8, 8), path)
    return torch.load(path, weights_only=True)


def load_stage(module: Any, work: Path, stage: str, key: str | None = None) -> Any:
    module.load_state_dict(torch.load(work / f"{stage}.pt", weights_only=True)[key or stage])
    return module


def train_diffusion(work: Path, steps: int = 2400, batch: int = 64, decay: float = 0.998) -> None:
    torch.manual_seed(3)
    tokenizer = build_tokenizer(work / "tokenizer")
    modules: dict[str, nn.Module] = {"unet": build_unet(), "text": build_text_encoder(tokenizer)}
    averages = {k: copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()}
    stage = Stage("diffusion", work, modules | {f"{k}_average": m for k, m in averages.items()}, steps, 1.2e-3, seed=13)
    latents = latent_pool(work)
    alphas = build_scheduler().alphas_cumprod
    running = 1.0
    for step in stage:
        captions, scenes = zip(*(random_caption(stage.generator) for _ in range(batch)), strict=True)
        o, s, c = labels_of(list(scenes)).unbind(1)
        x = latents[o, s, c, stage.pick(latents.shape[3], batch)]
        t = torch.randint(1000, (batch,), generator=stage.generator)
        noise = torch.randn(x.shape, generator=stage.generator)
        a = alphas[t][:, None, None, None]
        ids = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        context = modules["text"](ids).last_hidden_state
        predicted = modules["unet"](a.sqrt() * x + (1 - a).sqrt() * noise, t, context).sample
        loss = F.mse_loss(predicted, noise)
        stage.update(loss)
        weight = min(decay, (step + 1) / (step + 10))
        for key, average in averages.items():
            for old, new in zip(average.parameters(), modules[key].parameters(), strict=True):
                old.lerp_(new.detach(), 1 - weight)
        running += 0.02 * (loss.item() - running)
        if step % 50 == 0:
            print(f"diffusion step {step} loss {running:.4f}", flush=True)


def train_export(work: Path, folder: Path = Path(__file__).parent / "model") -> None:
    """Write the trained parts in float16 as a Stable Diffusion pipeline folder, the classifier beside them."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    load_stage(build_unet(), work, "diffusion", "unet_average").half().save_pretrained(folder / "unet")
    load_stage(build_text_encoder(tokenizer), work, "diffusion", "text_average").half().save_pretrained(folder / "text_encoder")
    load_stage(AutoencoderTiny(), work, "vae").half().save_pretrained(folder / "vae")
    build_scheduler().save_pretrained(folder / "scheduler")
    classifier = load_stage(Classifier(), work, "classifier")
    save_file({k: v.half().contiguous() for k, v in classifier.state_dict().items()}, folder / "classifier.safetensors")
    parts = {"scheduler": "DDIMScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderTiny"}
    index: dict[str, object] = {k: ["diffusers", v] for k, v in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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
