"""One generation, with the host's callbacks in the host's order; latents instead of pictures."""

import torch

from . import extra_networks, infotext_utils, prompt_parser, script_callbacks, shared

COND, UNCOND = 0, 1


class StableDiffusionProcessing:
    def __init__(self, prompt="", negative_prompt="", seed=0, batch_size=1, n_iter=1, steps=3, scripts=None, script_args=(), **more):
        self.prompt, self.negative_prompt, self.seed = prompt, negative_prompt, seed
        self.batch_size, self.n_iter, self.steps = batch_size, n_iter, steps
        self.scripts, self.script_args = scripts, script_args
        self.extra_generation_params, self.comments = {}, {}
        self.enable_hr, self.is_hr_pass, self.hr_prompt, self.hr_negative_prompt = False, False, "", ""
        self.iteration, self.cond_scale, self.on_step, self.init_latent, self.mask = 0, 5.0, None, None, None
        for name, value in more.items():
            setattr(self, name, value)

    @property
    def sd_model(self):
        return shared.sd_model

    def comment(self, text):
        self.comments[text] = 1

    def setup_prompts(self):
        def every(value, count):
            return list(value) if isinstance(value, list) else count * [value]

        count = len(self.prompt) if isinstance(self.prompt, list) else self.batch_size * self.n_iter
        self.all_prompts, self.all_negative_prompts = every(self.prompt, count), every(self.negative_prompt, count)
        if self.enable_hr:
            self.all_hr_prompts = every(self.hr_prompt or self.prompt, count)
            self.all_hr_negative_prompts = every(self.hr_negative_prompt or self.negative_prompt, count)

    def parse_extra_network_prompts(self):
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)
        if self.enable_hr:
            part = slice(self.iteration * self.batch_size, (self.iteration + 1) * self.batch_size)
            self.hr_negative_prompts = self.all_hr_negative_prompts[part]
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(self.all_hr_prompts[part])

    def setup_conds(self):
        self.uc = prompt_parser.get_learned_conditioning(self.sd_model, self.negative_prompts, self.steps)
        self.c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.prompts, self.steps)
        if self.enable_hr:
            self.hr_uc = prompt_parser.get_learned_conditioning(self.sd_model, self.hr_negative_prompts, self.steps)
            self.hr_c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.hr_prompts, self.steps)

    def sample(self, conditioning, unconditional_conditioning, seeds, prompts):
        """Other extensions put their own in place of it."""
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        if self.init_latent is not None:
            x = self.init_latent + 0.5 * x
        _reset_forge(self)
        _before_sampling(self, x)
        x = _sample(self, x, self.steps)
        if self.enable_hr:
            self.is_hr_pass = True
            x = torch.nn.functional.interpolate(x, scale_factor=2)
            extra_networks.activate(self, self.hr_extra_network_data)
            if hasattr(self.sd_model, "forge_objects"):
                _before_sampling(self, x)
            _reset_forge(self)
            _before_sampling(self, x)
            x = _sample(self, x, self.steps)
            self.is_hr_pass = False
        return x

    def get_conds(self):
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else (self.c, self.uc)


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
        if p.on_step is not None:
            p.on_step(p, step)
        model = p.sd_model
        c, uc = p.get_conds()
        owners = [i for i, parts in enumerate(c.batch) for _ in parts]
        cond = _stack([_at(part.schedules, step) for parts in c.batch for part in parts])
        uncond = _stack([_at(s, step) for s in uc])
        params = script_callbacks.CFGDenoiserParams(x, None, None, step, steps, cond, uncond, Denoiser(p))
        for callback in script_callbacks.callbacks["cfg_denoiser"]:
            callback(params)
        out = (_forge if forge else _a1111)(model, x, 900 - 200 * step, cond, uncond, owners)
        negative = out[len(owners) :]
        guided = negative.clone()
        for row, image in enumerate(owners):
            guided[image] += (out[row] - negative[image]) * p.cond_scale
        x = x - 0.2 * guided
        if p.mask is not None:
            x = x * (1 - p.mask) + p.init_latent * p.mask
    return x


def _reset_forge(p):
    if hasattr(p.sd_model, "forge_objects"):
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()


def _before_sampling(p, x):
    if p.scripts is not None:
        p.scripts.call("process_before_every_sampling", p, x=x, noise=x, c=p.get_conds()[0], uc=p.get_conds()[1])


@torch.no_grad()
def process_images(p):
    """Latents ``(images, 4, 8, 8)`` (16 x 16 after a hires pass) and an infotext each."""
    p.setup_prompts()
    seeds = list(range(p.seed, p.seed + len(p.all_prompts)))
    if p.scripts is not None:
        p.scripts.call("process", p)
    results, infotexts = [], []
    for n in range(-(-len(p.all_prompts) // p.batch_size)):
        part = slice(n * p.batch_size, (n + 1) * p.batch_size)
        p.iteration, p.is_hr_pass = n, False
        p.prompts, p.negative_prompts, p.seeds = p.all_prompts[part], p.all_negative_prompts[part], seeds[part]
        given = {"batch_number": n, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.seeds}
        if p.scripts is not None:
            p.scripts.call("before_process_batch", p, **given)
        p.parse_extra_network_prompts()
        extra_networks.activate(p, p.extra_network_data)
        if p.scripts is not None:
            p.scripts.call("process_batch", p, **(given | {"prompts": p.prompts}))
        p.setup_conds()
        x = p.sample(conditioning=p.c, unconditional_conditioning=p.uc, seeds=p.seeds, prompts=p.prompts)
        if p.scripts is not None:
            p.scripts.call("postprocess_batch", p, images=x, batch_number=n)
        results.append(x)
        params = {"Steps": p.steps, "Sampler": "Toy", "Seed": p.seeds[0]} | p.extra_generation_params
        last = ", ".join(f"{k}: {infotext_utils.quote(v)}" for k, v in params.items())
        infotexts += [f"{prompt}\n{last}" for prompt in p.all_prompts[part]]
    if p.scripts is not None:
        p.scripts.call("postprocess", p, None)
    return torch.cat(results), infotexts
