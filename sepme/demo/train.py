"""Train the model of a drawing world: ``python -m sepme.demo.train [vae|classifier|diffusion|export]`` (all, in that order, by default).

``--world large`` trains the larger world's, starting from the embedded one. Seeded, resumable: every stage writes a checkpoint
to ``--work`` each few hundred steps and goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..evaluate.network import Network
from .large import LARGE
from .world import BOTH_PROMPTS, OBJECT_PROMPTS, SMALL, STYLE_PROMPTS, Drawing, World

EMBEDDED = Path(__file__).parent / "model"


@dataclass(frozen=True)
class WorldRecipe:
    """How the model of a world is trained.

    Attributes:
        scenes: drawings that the autoencoder and the classifier are trained on. each: latents of every scene.
        vae_width: channels of the autoencoder. vocabulary: of the byte-pair training.
        start: model folder whose text encoder and UNet training starts from, or None.
    """

    world: World
    scenes: int = 6144
    vae_width: int = 64
    vae_steps: int = 1300
    vae_rate: float = 1.5e-3
    classifier_steps: int = 300
    diffusion_steps: int = 2400
    batch: int = 64
    each: int = 40
    vocabulary: int = 1100
    start: Path | None = None


RECIPES = {
    "small": WorldRecipe(SMALL),
    "large": WorldRecipe(
        LARGE,
        vae_width=32,
        vae_steps=1500,
        vae_rate=2e-3,
        classifier_steps=500,
        diffusion_steps=1800,
        batch=32,
        each=3,
        vocabulary=1400,
        start=EMBEDDED,
    ),
}


def pool(world: World, seed: int, count: int) -> tuple[Tensor, list[Drawing]]:
    """``count`` drawings as ``(count, 3, 64, 64)`` uint8 and their scenes."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [world.random_scene(generator) for _ in range(count)]
    images = torch.stack([(world.draw(s, generator) * 255).round().to(torch.uint8) for s in scenes])
    return images, scenes


def to_model(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class WorldStage:
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
            if self.step % 50 == 0 or self.step == self.steps:
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


def build_vae(recipe: WorldRecipe) -> AutoencoderTiny:
    widths = (recipe.vae_width,) * 4
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)


def train_vae(work: Path, recipe: WorldRecipe, batch: int = 12) -> AutoencoderTiny:
    torch.manual_seed(1)
    vae = build_vae(recipe).to(memory_format=torch.channels_last)
    stage = WorldStage("vae", work, {"vae": vae}, recipe.vae_steps, recipe.vae_rate, seed=11)
    images, _ = pool(recipe.world, 101, recipe.scenes)
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


def train_classifier(work: Path, recipe: WorldRecipe, batch: int = 64) -> Network:
    torch.manual_seed(2)
    model = Network(recipe.world.labels)
    stage = WorldStage("classifier", work, {"classifier": model}, recipe.classifier_steps, 2e-3, seed=12)
    images, scenes = pool(recipe.world, 102, recipe.scenes)
    labels = torch.tensor(scenes)
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


def build_tokenizer(folder: Path, recipe: WorldRecipe = RECIPES["small"]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges know the world's words; other words fall into smaller pieces."""
    corpus = Path(__file__).parents[1] / "data" / "ordinary_prompts.txt"
    words = list(recipe.world.words)
    texts = [*OBJECT_PROMPTS, *STYLE_PROMPTS, *BOTH_PROMPTS, *recipe.world.filler, "an"] * 50 + words * 200
    texts += corpus.read_text(encoding="utf-8").split("\n")
    trained = CLIPTokenizer().train_new_from_iterator(iter(texts), vocab_size=recipe.vocabulary, show_progress=False)
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


def tokenizer_of(work: Path, recipe: WorldRecipe) -> CLIPTokenizer:
    """The tokenizer of a training run, built once: equally frequent pairs merge in another order every time."""
    folder = work / "tokenizer"
    if not (folder / "merges.txt").exists():
        build_tokenizer(folder, recipe)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


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


def begin(module: nn.Module, folder: Path) -> None:
    """Load a folder's weights wherever their shapes are this module's."""
    (path,) = folder.glob("*.safetensors")
    own = module.state_dict()
    given = {k: v.float() for k, v in load_file(path).items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(own | given)


def begin_text(module: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Load a text encoder's weights, and the embeddings of tokens that both vocabularies have."""
    begin(module, folder / "text_encoder")
    embedding = module.get_input_embeddings().weight.data
    (given,) = (v for k, v in load_file(folder / "text_encoder" / "model.safetensors").items() if k.endswith("token_embedding.weight"))
    known, own = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8")), tokenizer.get_vocab()
    shared = [token for token in own if token in known]
    embedding[[own[t] for t in shared]] = given[[known[t] for t in shared]].float()


def latent_pool(work: Path, recipe: WorldRecipe) -> Tensor:
    """Latents of drawings of every scene: ``(objects, styles + 1, colours, each, 4, 8, 8)``."""
    path = work / "latents.pt"
    if not path.exists():
        vae = load_stage(build_vae(recipe), work, "vae").to(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(103)
        shape = recipe.world.heads
        latents = []
        for o, s, c in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
            images = torch.stack([recipe.world.draw(Drawing(o, s, c), generator) for _ in range(recipe.each)]) * 2 - 1
            with torch.no_grad():
                latents.append(vae.encoder(images.to(memory_format=torch.channels_last)).contiguous())
        torch.save(torch.stack(latents).reshape(*shape, recipe.each, 4, 8, 8), path)
    return torch.load(path, weights_only=True)


def load_stage(module: Any, work: Path, stage: str, key: str | None = None) -> Any:
    module.load_state_dict(torch.load(work / f"{stage}.pt", weights_only=True)[key or stage])
    return module


def train_diffusion(work: Path, recipe: WorldRecipe, decay: float = 0.998) -> None:
    torch.manual_seed(3)
    batch = recipe.batch
    tokenizer = tokenizer_of(work, recipe)
    modules: dict[str, nn.Module] = {"unet": build_unet(), "text": build_text_encoder(tokenizer)}
    if recipe.start:
        begin(modules["unet"], recipe.start / "unet")
        begin_text(modules["text"], tokenizer, recipe.start)
    averages = {k: copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()}
    stage = WorldStage(
        "diffusion", work, modules | {f"{k}_average": m for k, m in averages.items()}, recipe.diffusion_steps, 1.2e-3, seed=13
    )
    latents = latent_pool(work, recipe)
    alphas = build_scheduler().alphas_cumprod
    running = 1.0
    for step in stage:
        captions, scenes = zip(*(recipe.world.random_caption(stage.generator) for _ in range(batch)), strict=True)
        o, s, c = torch.tensor(scenes).unbind(1)
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


def train_export(work: Path, recipe: WorldRecipe) -> None:
    """Write the trained parts in float16 as a Stable Diffusion pipeline folder ``--work``/model, the classifier beside them."""
    folder = work / "model"
    tokenizer = tokenizer_of(work, recipe)
    tokenizer.save_pretrained(folder / "tokenizer")
    load_stage(build_unet(), work, "diffusion", "unet_average").half().save_pretrained(folder / "unet")
    load_stage(build_text_encoder(tokenizer), work, "diffusion", "text_average").half().save_pretrained(folder / "text_encoder")
    load_stage(build_vae(recipe), work, "vae").half().save_pretrained(folder / "vae")
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["block_out_channels"]  # AutoencoderTiny writes it and then warns about it
    (folder / "vae" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    build_scheduler().save_pretrained(folder / "scheduler")
    load_stage(Network(recipe.world.labels), work, "classifier").save(folder)
    parts = {"scheduler": "DDIMScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderTiny"}
    index: dict[str, object] = {k: ["diffusers", v] for k, v in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["vae", "classifier", "diffusion", "export"])
    parser.add_argument("--world", choices=RECIPES, default="small")
    parser.add_argument("--work", type=Path, help="runs/<world>-world by default; the model is written to its folder 'model'")
    arguments = parser.parse_args()
    work = arguments.work or Path(f"runs/{arguments.world}-world")
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        globals()[f"train_{stage}"](work, RECIPES[arguments.world])


if __name__ == "__main__":
    main()
