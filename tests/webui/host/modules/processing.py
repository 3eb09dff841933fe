"""One generation, with the host's callbacks in the host's order; latents instead of pictures."""

from dataclasses import dataclass, field
from typing import Any

import torch

from . import extra_networks, infotext_utils, prompt_parser, script_callbacks, shared

COND, UNCOND = 0, 1


@dataclass(repr=False)
class StableDiffusionProcessing:
    """What both tabs have. Defaults are the real ones; many are None until the host, or the tab, comes to them."""

    sd_model: object = None
    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] = None
    seed: int = -1
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    sampler_name: str = None
    extra_generation_params: dict[str, Any] = None
    override_settings: dict[str, Any] = None
    disable_extra_networks: bool = False

    scripts_value: Any = field(default=None, init=False)
    script_args_value: list = field(default=None, init=False)

    comments: dict = None

    is_hr_pass: bool = field(default=False, init=False)

    c: tuple = field(default=None, init=False)
    uc: tuple = field(default=None, init=False)

    all_prompts: list = field(default=None, init=False)
    all_negative_prompts: list = field(default=None, init=False)
    all_seeds: list = field(default=None, init=False)
    iteration: int = field(default=0, init=False)

    prompts: list = field(default=None, init=False)
    negative_prompts: list = field(default=None, init=False)
    seeds: list = field(default=None, init=False)
    extra_network_data: dict = field(default=None, init=False)

    is_api: bool = field(default=False, init=False)

    def __post_init__(self):
        self.comments = {}
        self.extra_generation_params = self.extra_generation_params or {}
        self.override_settings = self.override_settings or {}
        self.script_args = self.script_args or {}

    @property
    def sd_model(self):  # noqa: F811
        return shared.sd_model

    @sd_model.setter
    def sd_model(self, value):
        pass

    @property
    def scripts(self):
        return self.scripts_value

    @scripts.setter
    def scripts(self, value):
        self.scripts_value = value

    @property
    def script_args(self):
        return self.script_args_value

    @script_args.setter
    def script_args(self, value):
        self.script_args_value = value

    def comment(self, text):
        self.comments[text] = 1

    def init(self, all_prompts, all_seeds, all_subseeds):
        pass

    def setup_prompts(self):
        if isinstance(self.prompt, list):
            self.all_prompts = self.prompt
        elif isinstance(self.negative_prompt, list):
            self.all_prompts = [self.prompt] * len(self.negative_prompt)
        else:
            self.all_prompts = self.batch_size * self.n_iter * [self.prompt]
        listed = isinstance(self.negative_prompt, list)
        self.all_negative_prompts = self.negative_prompt if listed else [self.negative_prompt] * len(self.all_prompts)
        self.all_prompts, self.all_negative_prompts = list(self.all_prompts), list(self.all_negative_prompts)  # styles make new ones

    def parse_extra_network_prompts(self):
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def setup_conds(self):
        _set_clip_skip(self.sd_model)
        self.uc = prompt_parser.get_learned_conditioning(self.sd_model, self.negative_prompts, self.steps)
        self.c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.prompts, self.steps)

    def get_conds(self):
        return self.c, self.uc

    def _noise(self, seeds):
        return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """With a second pass at twice the size where ``enable_hr`` is on; what belongs to it stays None otherwise."""

    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_prompt: str = ""
    hr_negative_prompt: str = ""

    hr_c: tuple | None = field(default=None, init=False)
    hr_uc: tuple | None = field(default=None, init=False)
    all_hr_prompts: list = field(default=None, init=False)
    all_hr_negative_prompts: list = field(default=None, init=False)
    hr_prompts: list = field(default=None, init=False)
    hr_negative_prompts: list = field(default=None, init=False)
    hr_extra_network_data: list = field(default=None, init=False)

    def init(self, all_prompts, all_seeds, all_subseeds):
        if self.enable_hr:
            self.extra_generation_params["Hires upscale"] = self.hr_scale

            def get_hr_prompt(p, index, prompt_text, **kwargs):
                hr_prompt = p.all_hr_prompts[index]
                return hr_prompt if hr_prompt != prompt_text else None

            def get_hr_negative_prompt(p, index, negative_prompt, **kwargs):
                hr_negative_prompt = p.all_hr_negative_prompts[index]
                return hr_negative_prompt if hr_negative_prompt != negative_prompt else None

            self.extra_generation_params["Hires prompt"] = get_hr_prompt
            self.extra_generation_params["Hires negative prompt"] = get_hr_negative_prompt

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        """Other extensions put their own in place of it."""
        x = self._noise(seeds)
        _reset_forge(self)
        _before_sampling(self, x)
        x = _sample(self, x, self.steps)
        if not self.enable_hr:
            return x
        self.is_hr_pass = True
        x = torch.nn.functional.interpolate(x, scale_factor=2)
        if not self.disable_extra_networks:
            extra_networks.activate(self, self.hr_extra_network_data)
        self.calculate_hr_conds()
        if hasattr(self.sd_model, "forge_objects"):
            _before_sampling(self, x)
        _reset_forge(self)
        _before_sampling(self, x)
        x = _sample(self, x, self.steps)
        self.is_hr_pass = False
        return x

    def setup_prompts(self):
        super().setup_prompts()
        if not self.enable_hr:
            return
        if self.hr_prompt == "":
            self.hr_prompt = self.prompt
        if self.hr_negative_prompt == "":
            self.hr_negative_prompt = self.negative_prompt
        count = self.batch_size * self.n_iter
        self.all_hr_prompts = list(self.hr_prompt) if isinstance(self.hr_prompt, list) else count * [self.hr_prompt]
        listed = isinstance(self.hr_negative_prompt, list)
        self.all_hr_negative_prompts = list(self.hr_negative_prompt) if listed else count * [self.hr_negative_prompt]

    def calculate_hr_conds(self):
        _set_clip_skip(self.sd_model)
        self.hr_uc = prompt_parser.get_learned_conditioning(self.sd_model, self.hr_negative_prompts, self.steps)
        self.hr_c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.hr_prompts, self.steps)

    def get_conds(self):
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else super().get_conds()

    def parse_extra_network_prompts(self):
        super().parse_extra_network_prompts()
        if self.enable_hr:
            part = slice(self.iteration * self.batch_size, (self.iteration + 1) * self.batch_size)
            self.hr_prompts = self.all_hr_prompts[part]
            self.hr_negative_prompts = self.all_hr_negative_prompts[part]
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(self.hr_prompts)


@dataclass(repr=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """It has nothing of the second pass, not even the attributes. ``mask`` is where the picture stays as it was."""

    init_images: list = None
    mask: Any = None

    image_mask: Any = field(default=None, init=False)
    init_latent: torch.Tensor = field(default=None, init=False)

    def __post_init__(self):
        super().__post_init__()
        self.image_mask = self.mask
        self.mask = None

    def init(self, all_prompts, all_seeds, all_subseeds):
        self.init_latent = torch.cat(self.init_images)

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        x = self.init_latent + 0.5 * self._noise(seeds)
        _reset_forge(self)
        _before_sampling(self, x)
        return _sample(self, x, self.steps)


def _set_clip_skip(model):
    if hasattr(model, "forge_objects"):
        model.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))


class Denoiser:
    def __init__(self, p):
        self.p = p


def _at(schedules, step):
    return next((s.cond for s in schedules if step <= s.end_at_step), schedules[-1].cond)


def _stack(conds):
    if isinstance(conds[0], dict):
        return {k: torch.stack([c[k] for c in conds]) for k in conds[0]}
    longest = max(len(c) for c in conds)
    return torch.stack([torch.cat([c, c[-1:].repeat(longest - len(c), 1)]) for c in conds])  # the last vector, repeated


def _pick(cond, index):
    return {k: v[index] for k, v in cond.items()} if isinstance(cond, dict) else cond[index]


def _cat(a, b):
    return {k: torch.cat([a[k], b[k]]) for k in a} if isinstance(a, dict) else torch.cat([a, b])


def _tokens(cond):
    return (cond["crossattn"] if isinstance(cond, dict) else cond).shape[1]


def _a1111(model, x, t, cond, uncond, owners):
    """Prompts first; one call, or several where lengths differ or the user wants so."""

    def call(x, cond):
        at = torch.full((len(x),), t)
        return model.model(x, at, cond) if isinstance(cond, dict) else model.model(x, at, c_crossattn=[cond])

    given = x[owners]
    if _tokens(cond) == _tokens(uncond):
        both, rows = _cat(cond, uncond), torch.cat([given, x])
        size = len(rows) if shared.opts.batch_cond_uncond else len(x)
        return torch.cat([call(rows[i : i + size], _pick(both, slice(i, i + size))) for i in range(0, len(rows), size)])
    size = len(x) * (2 if shared.opts.batch_cond_uncond else 1)
    parts = [call(given[i : i + size], _pick(cond, slice(i, i + size))) for i in range(0, len(given), size)]
    return torch.cat([*parts, call(x, uncond)])


def _forge(model, x, t, cond, uncond, owners):
    """One chunk a part of AND, negative prompts first; contexts of different lengths are repeated to one length."""
    images, parts = len(x), len(owners) // len(x)
    chunks = [(UNCOND, uncond)] + [(COND, _pick(cond, [i * parts + j for i in range(images)])) for j in range(parts)]
    longest = max(_tokens(c) for _, c in chunks)
    joined = None
    for _, chunk in chunks:
        long = {"crossattn": chunk["crossattn"]} if isinstance(chunk, dict) else {"crossattn": chunk}
        long = {"c_crossattn": long["crossattn"].repeat(1, longest // _tokens(chunk), 1)}
        if isinstance(chunk, dict):
            long["y"] = chunk["vector"]
        joined = long if joined is None else _cat(joined, long)
    options = {"cond_or_uncond": [kind for kind, _ in chunks]}
    patcher = model.forge_objects.unet
    out = patcher.model.apply_model(
        x.repeat(len(chunks), 1, 1, 1), torch.full((len(chunks) * images,), t), transformer_options=options, **joined
    )
    negative, *positive = out.chunk(len(chunks))
    return torch.cat([torch.stack([positive[j][i] for i in range(images) for j in range(parts)]), negative])


def sampling_prepare(unet, x):
    unet.load()


def _sample(p, x, steps):
    model = p.sd_model
    forge = hasattr(model, "forge_objects")
    if forge:
        sampling_prepare(model.forge_objects.unet, x)
    for step in range(steps):
        if hasattr(p, "on_step"):  # of a test
            p.on_step(p, step)
        model = p.sd_model
        c, uc = p.get_conds()
        owners = [i for i, parts in enumerate(c.batch) for _ in parts]
        cond = _stack([_at(part.schedules, step) for parts in c.batch for part in parts])
        uncond = _stack([_at(s, step) for s in uc])
        params = script_callbacks.CFGDenoiserParams(x, None, None, step, steps, cond, uncond, Denoiser(p))
        for callback in script_callbacks.callbacks["cfg_denoiser"]:
            callback(params)
        cond, uncond = params.text_cond, params.text_uncond
        out = (_forge if forge else _a1111)(model, x, 900 - 200 * step, cond, uncond, owners)
        negative = out[len(owners) :]
        guided = negative.clone()
        for row, image in enumerate(owners):
            guided[image] += (out[row] - negative[image]) * p.cfg_scale
        x = x - 0.2 * guided
        if getattr(p, "image_mask", None) is not None:
            x = x * (1 - p.image_mask) + p.init_latent * p.image_mask
    return x


def _reset_forge(p):
    if hasattr(p.sd_model, "forge_objects"):
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()


def _before_sampling(p, x):
    if p.scripts is not None:
        p.scripts.call("process_before_every_sampling", p, x=x, noise=x, c=p.get_conds()[0], uc=p.get_conds()[1])


def process_images(p):
    stored = {k: getattr(shared.opts, k) for k in p.override_settings}
    vars(shared.opts).update(p.override_settings)
    try:
        return process_images_inner(p)
    finally:
        vars(shared.opts).update(stored)


@torch.no_grad()
def process_images_inner(p):
    """Latents ``(images, 4, 8, 8)`` (16 x 16 after a hires pass) and an infotext each."""
    p.setup_prompts()
    p.all_seeds = list(range(p.seed, p.seed + len(p.all_prompts)))
    if p.scripts is not None:
        p.scripts.call("process", p)
    p.init(p.all_prompts, p.all_seeds, p.all_seeds)
    results, infotexts = [], []
    for n in range(-(-len(p.all_prompts) // p.batch_size)):
        part = slice(n * p.batch_size, (n + 1) * p.batch_size)
        p.iteration = n
        p.prompts, p.negative_prompts, p.seeds = p.all_prompts[part], p.all_negative_prompts[part], p.all_seeds[part]
        given = {"batch_number": n, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.seeds}
        if p.scripts is not None:
            p.scripts.call("before_process_batch", p, **given)
        p.parse_extra_network_prompts()
        if not p.disable_extra_networks:
            extra_networks.activate(p, p.extra_network_data)
        if p.scripts is not None:
            p.scripts.call("process_batch", p, **(given | {"prompts": p.prompts}))
        p.setup_conds()
        x = p.sample(p.c, p.uc, seeds=p.seeds, subseeds=p.seeds, subseed_strength=0, prompts=p.prompts)
        if p.scripts is not None:
            p.scripts.call("postprocess_batch", p, images=x, batch_number=n)
            p.prompts, p.negative_prompts = p.all_prompts[part], p.all_negative_prompts[part]
        results.append(x)
        infotexts += [create_infotext(p, i) for i in range(len(p.prompts))]
    if p.scripts is not None:
        p.scripts.call("postprocess", p, None)
    return torch.cat(results), infotexts


def create_infotext(p, index):
    prompt_text, negative_prompt = p.prompts[index], p.negative_prompts[index]
    params = {"Steps": p.steps, "Sampler": "Toy", "Seed": p.seeds[index]} | p.extra_generation_params
    known = dict(locals())
    params = {k: v(**known) if callable(v) else v for k, v in params.items()}
    last = ", ".join(k if k == v else f"{k}: {infotext_utils.quote(v)}" for k, v in params.items() if v is not None)
    return prompt_text + (f"\nNegative prompt: {negative_prompt}" if negative_prompt else "") + f"\n{last}"
