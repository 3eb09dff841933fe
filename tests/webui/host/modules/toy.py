"""A toy checkpoint: a UNet with the names of Stable Diffusion's, a text encoder of random words, wrapped as either host does."""

from functools import lru_cache
from types import SimpleNamespace

import torch
from conftest import CrossAttention, TinyEncoder
from torch import nn

from . import prompt_parser, shared

D_IN, WIDTH = 320, 32


class Encoder(TinyEncoder):
    word = lru_cache(TinyEncoder.word)


class Transformer(nn.Module):
    def __init__(self, d_out):
        super().__init__()
        block = nn.Module()
        block.attn2 = CrossAttention(WIDTH, D_IN, d_out)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x, context):
        return self.transformer_blocks[0].attn2(torch.tanh(x), context)


class UNetModel(nn.Module):
    image_size = 8

    def __init__(self, seed=0, pooled=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter, self.leave = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
            self.label = nn.Linear(pooled + 6 * 256, WIDTH) if pooled else None
            self.input_blocks = nn.ModuleList([nn.Identity(), nn.ModuleList([nn.Identity(), Transformer(16)])])
            self.middle_block = nn.ModuleList([nn.Identity(), Transformer(24)])
            self.output_blocks = nn.ModuleList([nn.ModuleList([nn.Identity(), Transformer(16)])])

    def forward(self, x, timesteps=None, context=None, control=None, transformer_options=None, y=None):
        time = (timesteps.float() / 1000).reshape(-1, 1, 1).expand(len(x), x.shape[2] * x.shape[3], 1)
        h = self.enter(torch.cat([x.flatten(2).transpose(1, 2), time.to(x)], dim=-1))
        if self.label is not None:
            h = h + self.label(y)[:, None]
        for block in (self.input_blocks[1][1], self.middle_block[1], self.output_blocks[0][1]):
            h = block(h, context)
        return self.leave(h).transpose(1, 2).reshape(x.shape)


class DiffusionWrapper(nn.Module):
    """SD1 in Automatic1111; with a mapping as third argument SDXL."""

    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet

    def forward(self, x, t, c_concat=None, c_crossattn=None, c_adm=None):
        if isinstance(c_concat, dict):
            return self.diffusion_model(x, t, context=c_concat["crossattn"], y=c_concat["vector"])
        return self.diffusion_model(x, t, context=torch.cat(c_crossattn, 1))


class KModel(nn.Module):
    """Forge's: sigma in, context and everything else by name."""

    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet
        self.predictor = SimpleNamespace(sigmas=((1 - alphas()) / alphas()).sqrt(), prediction_type="epsilon")

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None, **kwargs):
        return self.diffusion_model(x, t, context=c_crossattn, control=None, transformer_options=transformer_options, **kwargs)


class UnetPatcher:
    """Forge's: patches are put on the model when a patcher is loaded, and taken off when another is."""

    loaded = None

    def __init__(self, model):
        self.model, self.object_patches, self.backup, self.model_options = model, {}, {}, {"transformer_options": {}}

    def clone(self):
        other = UnetPatcher(self.model)
        other.object_patches = dict(self.object_patches)
        return other

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def _set(self, name, value):
        *path, last = name.split(".")
        owner = self.model
        for part in path:
            owner = getattr(owner, part)
        found = getattr(owner, last)
        setattr(owner, last, value)
        return found

    def load(self):
        if UnetPatcher.loaded is self:
            return
        if UnetPatcher.loaded is not None:
            other = UnetPatcher.loaded
            for name, value in other.backup.items():
                other._set(name, value)
            other.backup = {}
        for name, value in self.object_patches.items():
            self.backup[name] = self._set(name, value)
        UnetPatcher.loaded = self


class ForgeObjects:
    def __init__(self, unet):
        self.unet = unet

    def shallow_copy(self):
        return ForgeObjects(self.unet)


def alphas():
    return torch.linspace(0.999, 0.005, 1000)


class Checkpoint:
    def __init__(self, seed=0, pooled=0, kind=None):
        self.encoder, self.pooled, self.texts = Encoder(D_IN, 77), pooled, []
        self.sd_checkpoint_info = SimpleNamespace(filename=f"toy{seed}.safetensors", name=f"toy{seed}")
        self.is_sd1, self.is_sd2, self.is_sdxl = not pooled, False, bool(pooled)
        unet = UNetModel(seed, pooled).requires_grad_(False)
        if (kind or shared.kind) == "forge":
            self.forge_objects = ForgeObjects(UnetPatcher(KModel(unet)))
            self.forge_objects_original = self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
            least = 2 if pooled else 1
            self.text_processing_engine = SimpleNamespace(minimal_clip_skip=least, clip_skip=least)
            self.get_prompt_lengths_on_ui = lambda prompt: (len(prompt_parser.words(prompt)), 75)
        else:
            self.model, self.alphas_cumprod, self.parameterization = DiffusionWrapper(unet), alphas(), "eps"

    @property
    def unet(self):
        return (self.forge_objects.unet.model if hasattr(self, "forge_objects") else self.model).diffusion_model

    def set_clip_skip(self, clip_skip):
        self.text_processing_engine.clip_skip = clip_skip

    def _skipped(self):
        """CLIP's layers beyond what the checkpoint is made for."""
        if hasattr(self, "forge_objects"):
            engine = self.text_processing_engine
            return max(engine.clip_skip, engine.minimal_clip_skip) - engine.minimal_clip_skip
        return 0 if self.is_sdxl else shared.opts.CLIP_stop_at_last_layers - 1

    def get_learned_conditioning(self, prompts):
        """77 tokens for every 75 words; other vectors where layers are skipped."""
        self.texts += list(prompts)
        chunks = [[words[i : i + 75] for i in range(0, max(len(words), 1), 75)] for words in map(prompt_parser.words, prompts)]
        longest = max(map(len, chunks))
        rows = [torch.cat([*self.encoder.encode([" ".join(c) for c in parts + [[]] * (longest - len(parts))]).context]) for parts in chunks]
        context = torch.stack(rows).roll(self._skipped(), dims=2)
        if not self.pooled:
            return context
        pooled = context[:, :77, : self.pooled].mean(dim=1)
        return {"crossattn": context, "vector": torch.cat([pooled, torch.ones(len(context), 6 * 256)], dim=1)}
