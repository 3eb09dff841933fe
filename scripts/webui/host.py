"""The one file that touches the hosts' internals: folders, patches, the loaded model's text encoder and UNet, jobs.

Automatic1111 and its Forges differ in where the UNet is, how it is patched and in which order rows come. Everything else is shared.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from modules import call_queue, devices, extra_networks, paths, prompt_parser, script_callbacks, scripts, shared, ui_components
from torch import Tensor, nn

from ...sepme import ddim
from ...sepme.errors import Interrupted, SepMEError
from ...sepme.layers import architecture, ldm_layers, shapes
from ...sepme.library import DeltaLibrary
from ...sepme.protocols import AttentionLayer, Encoding
from ...sepme.runtime import KVProjector
from .rows import Expected, by_order
from .settings import Settings, Tables

Script, AlwaysVisible = scripts.Script, scripts.AlwaysVisible
InputAccordion = ui_components.InputAccordion
ExtraNetwork, register_extra_network = extra_networks.ExtraNetwork, extra_networks.register_extra_network
on_before_ui, on_cfg_denoiser = script_callbacks.on_before_ui, script_callbacks.on_cfg_denoiser
on_ui_tabs = script_callbacks.on_ui_tabs

library = DeltaLibrary(lambda: [Path(paths.models_path) / "sepme"])
SIDES = {768: 64, 1024: 64, 2048: 128}  # latents of SD1.x, SD2.x and SDXL, by width of the context
SIZES = 6 * 256  # what SDXL's vector holds behind the pooled text: six sizes
CHUNK, BATCH = 77, 32  # tokens of a chunk, prompts encoded at once


def lora_folder() -> Path:
    return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(paths.models_path) / "Lora")


def checkpoint_folder() -> Path:
    return Path(getattr(shared.cmd_opts, "ckpt_dir", None) or Path(paths.models_path) / "Stable-diffusion")


def checkpoint_file() -> Path:
    """The file of the loaded checkpoint."""
    return Path(shared.sd_model.sd_checkpoint_info.filename)


def script_modules() -> list[Any]:
    """The modules of all scripts that the host has loaded."""
    return [data.module for data in scripts.scripts_data]


def is_forge(model: Any) -> bool:
    return getattr(model, "forge_objects", None) is not None


def unet_of(model: Any) -> nn.Module:
    """The diffusion model of a loaded checkpoint.

    Raises:
        SepMEError: nothing is loaded, or no Stable Diffusion UNet.
    """
    owner = model.forge_objects.unet.model if is_forge(model) else getattr(model, "model", None)
    unet = getattr(owner, "diffusion_model", None)
    if not isinstance(unet, nn.Module):
        raise SepMEError("No checkpoint is loaded; choose one at the top of the page first.")
    return unet


def attention_layers(model: Any) -> dict[str, AttentionLayer]:
    """Cross-attention modules of a loaded checkpoint by canonical name.

    Raises:
        SepMEError: it has none that a delta could be for.
    """
    layers = ldm_layers(unet_of(model))
    if not layers:
        raise SepMEError("The loaded checkpoint is no SD1.x, SD2.x or SDXL; SepME edits the text layers of those only.")
    return layers


def architecture_of(model: Any) -> str:
    return architecture(shapes(attention_layers(model)))


class Hook:
    """A ``forward`` that this extension put on a module; ``before`` stood there."""

    def __init__(self, before: Callable[..., Any], call: Callable[..., Any]) -> None:
        self.before, self.call = before, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _before(module: nn.Module, found: Any) -> Callable[..., Any]:
    """What to call in place of our own hook: what another extension put there, or else the class's own, looked up at every call,
    since hosts patch classes for their LoRAs."""
    while isinstance(found, Hook):
        found = found.before
    return found or ClassForward(module)


class ClassForward:
    """``type(module).forward`` at the time of the call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def plain_weight(self) -> Tensor | None:
        """W where this is nothing but ``c Wᵀ`` now, the host's LoRAs included; None otherwise."""
        module, forward = self.module, type(self.module).forward
        if getattr(module, "bias", None) is not None:
            return None
        if type(module).__module__ == "backend.operations":  # Forge
            odd = (
                module.parameters_manual_cast or hasattr(module, "forge_online_loras") or getattr(module, "scale_weight", None) is not None
            )
            return None if odd or type(module).__qualname__ != "ForgeOperations.Linear" else module.weight  # type: ignore[return-value]
        if forward is not nn.Linear.forward:
            return None
        networks = sys.modules.get("networks")
        if forward.__module__ == "networks" and networks is not None and not getattr(shared.opts, "lora_functional", False):
            networks.network_apply_weights(module)
            return module.weight  # type: ignore[return-value]
        return module.weight if forward.__module__ == "torch.nn.modules.linear" else None  # type: ignore[return-value]


def _loras() -> tuple[Any, ...]:
    """What Automatic1111's LoRAs are at the moment; extensions change their weights between steps."""
    networks = sys.modules.get("networks")
    loaded = getattr(networks, "loaded_networks", ())
    return tuple((n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in loaded)


class Attached:
    """Deltas on the loaded model while one batch is drawn.

    Args:
        p: the host's processing object. on_unknown: called when rows come that belong to no prompt of the batch.
    """

    def __init__(self, p: Any, tables: Tables, settings: Settings, on_unknown: Callable[[], None]) -> None:
        self.p, self.model, self.tables, self.settings, self.on_unknown = p, p.sd_model, tables, settings, on_unknown
        self.projector: KVProjector | None = None
        self.expected: Expected | None = None
        self.unet = unet_of(self.model)
        self.projector = KVProjector(attention_layers(self.model), tables.composition, settings.gate, backend=settings.backend)
        self._found: list[tuple[nn.Module, Hook, Any]] = []
        self._patcher: Any = None
        if is_forge(self.model):
            self._patch_forge()
        else:
            self._patch_modules()

    @property
    def current(self) -> bool:
        """Whether the model is still the one that is patched; a refiner may have taken its place."""
        return unet_of(self.p.sd_model) is self.unet

    def _patch_modules(self) -> None:
        whole = self.model.model  # ControlNet replaces the UNet's own forward, so the pass begins one level above
        for name, module in self._projector.modules.items():
            before = _before(module, module.__dict__.get("forward"))
            self._put(module, Hook(before, self._projection(name, module, before)))
        before = _before(whole, whole.__dict__.get("forward"))
        self._put(whole, Hook(before, self._forward(before, _split_a1111, self._rows_a1111)))

    def _put(self, module: nn.Module, hook: Hook) -> None:
        self._found.append((module, hook, module.__dict__.get("forward")))
        module.forward = hook

    def _patch_forge(self) -> None:
        self._patcher = self.model.forge_objects.unet.clone()
        for name, module in self._projector.modules.items():
            path = f"diffusion_model.{name}.forward"
            before = _before(module, self._patcher.object_patches.get(path) or module.__dict__.get("forward"))
            self._patcher.add_object_patch(path, Hook(before, self._projection(name, module, before)))
        path = "diffusion_model.forward"
        before = _before(self.unet, self._patcher.object_patches.get(path) or self.unet.__dict__.get("forward"))
        self._patcher.add_object_patch(path, Hook(before, self._forward(before, _split_forge, self._rows_forge)))
        self._before_clone, self.model.forge_objects.unet = self.model.forge_objects.unet, self._patcher

    @property
    def _projector(self) -> KVProjector:
        assert self.projector is not None
        return self.projector

    def _projection(self, name: str, module: nn.Module, before: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        weight = before.plain_weight if isinstance(before, ClassForward) else lambda: None
        patched = self._projector.wrap(name, module, before, weight)
        return lambda context: patched(context) if self.projector is not None else before(context)

    def _forward(self, before: Callable[..., Any], split: Callable[..., Any], rows: Callable[..., Tensor | None]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = split(args, kwargs)
            if self.projector is None or call is None:
                return before(*args, **kwargs)
            context, vector, again = call
            table = self.tables.base if self.tables.uniform else rows(context, kwargs)
            if table is None:
                self.on_unknown()
                table = self.tables.base
            if vector is not None:
                args, kwargs = again(self._replace_pooled(vector, context, table))
            self.projector.state = _loras()
            with self.projector.forward_pass(table, context, self.tables.base, self.on_unknown):
                return before(*args, **kwargs)

        return forward

    def _replace_pooled(self, vector: Tensor, context: Tensor, table: Tensor) -> Tensor:
        widths = {d.pooled.down.shape[1] for d in self.tables.composition.deltas if d.pooled is not None}
        if not widths:
            return vector
        width = widths.pop()
        pooled = self.tables.composition.replace_pooled(vector[:, :width], context, table, self.settings.gate)
        return torch.cat([pooled, vector[:, width:]], dim=1)

    def expect(self, params: Any) -> None:
        """A denoising step begins; ``params`` are what the host tells its callbacks of it."""
        cond, uncond = _crossattn(params.text_cond), _crossattn(params.text_uncond)
        images, parts = len(self.tables.positive), [1] * len(cond)
        with suppress(AttributeError, TypeError, IndexError):
            parts = [len(prompts) for prompts in self.p.get_conds()[0].batch]
        known = len(parts) == images and sum(parts) == len(cond)
        self.expected = Expected.make(cond, uncond, parts, self.tables.positive, self.tables.negative) if known else None

    def _rows_a1111(self, context: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        return None if self.expected is None else self.expected.take(context)

    def _rows_forge(self, context: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        order = (kwargs.get("transformer_options") or {}).get("cond_or_uncond") or ()
        return by_order(len(context), order, self.tables.positive, self.tables.negative)

    def detach(self) -> None:
        """Leave the model as it was found; hooks that another owner still holds do nothing from now on."""
        for module, hook, found in reversed(self._found):
            if module.__dict__.get("forward") is hook:
                if found is None:
                    del module.forward
                else:
                    module.forward = found
        self._found.clear()
        if self._patcher is not None and self.model.forge_objects.unet is self._patcher:
            self.model.forge_objects.unet = self._before_clone
        self._patcher = self._before_clone = None
        if self.projector is not None:
            self.projector.clear()
        self.projector = self.expected = None

    def prepare(self, params: Any) -> None:
        """Load the patches of a model that was changed in the middle of a run; Forge loads before the first step only."""
        if self._patcher is not None:
            _load_forge(self._patcher, params.x)


def _load_forge(unet: Any, x: Tensor) -> None:
    """Put a Forge's UNet and its patches on the device, with room for latents like these."""
    from modules.sd_samplers_kdiffusion import sampling_prepare

    sampling_prepare(unet, x=x)


def _crossattn(cond: Any) -> Any:
    return cond["crossattn"] if isinstance(cond, Mapping) else cond


def _split_a1111(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Context, vector and how to call with another vector, of ``DiffusionWrapper`` (SD1, SD2) or ``OpenAIWrapper`` (SDXL)."""
    if len(args) > 2 and isinstance(args[2], Mapping):
        cond = args[2]
        return cond["crossattn"], cond.get("vector"), lambda v: ((*args[:2], {**cond, "vector": v}, *args[3:]), kwargs)
    context = kwargs.get("c_crossattn")
    if context is None:
        return None
    return (torch.cat(context, 1) if isinstance(context, (list, tuple)) else context), None, None


def _split_forge(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    context = kwargs.get("context")
    return None if context is None else (context, kwargs.get("y"), lambda v: (args, {**kwargs, "y": v}))


class LoadedModel:
    """The checkpoint in the UI as text encoder and denoiser; ``x_t = √ᾱ x_0 + √(1−ᾱ) ε``, always ε.

    Raises:
        SepMEError: nothing is loaded, no Stable Diffusion UNet, or one that predicts neither ε nor v.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.unet = model, unet_of(model)
        self._layers = attention_layers(model)
        self.width = shapes(self._layers).popitem()[1][1]
        self.alphas, kind = _schedule(model)
        if kind not in ("epsilon", "v"):
            raise SepMEError(f"The loaded checkpoint predicts {kind}; SepME trains on those that predict noise or v.")
        self.predicts_v = kind == "v"
        self.side = SIDES.get(self.width, getattr(self.unet, "image_size", 64))
        weight = next(iter(self._layers.values())).to_q.weight
        assert isinstance(weight, Tensor)
        self.device, self.dtype = torch.device(devices.device if not is_forge(model) else weight.device), weight.dtype
        self._tail: Tensor | None = None

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
        contexts = _crossattn(cond).clone()  # no inference tensors leave
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

    @property
    def timesteps(self) -> int:
        return len(self.alphas)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        x, t = x_t.to(self.device, self.dtype), t.to(self.device)
        y = None
        if extra is not None and self._tail is not None:
            y = torch.cat([extra, self._tail.to(extra).expand(len(extra), -1)], dim=1).to(self.device, self.dtype)
        out = self._call(x, t, context.to(self.device, self.dtype), y)
        if not self.predicts_v:
            return out  # type: ignore[no-any-return]
        alpha = self._alpha(t, x)
        return (alpha.sqrt() * out.float() + (1 - alpha).sqrt() * x.float()).to(out.dtype)

    def _call(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        """What the UNet itself returns; through the module at which Automatic1111 moves models to the device."""
        if is_forge(self.model):
            with torch.autograd.graph.saved_tensors_hooks(_copied, lambda saved: saved):
                return self.unet(x, t, context=context, transformer_options={}, **({} if y is None else {"y": y}))  # type: ignore[no-any-return]
        with devices.autocast():
            if y is None:
                return self.model.model(x, t, c_crossattn=[context])  # type: ignore[no-any-return]
            return self.model.model(x, t, {"crossattn": context, "vector": y})  # type: ignore[no-any-return]

    def noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self._alpha(t, x_0)
        return (alpha.sqrt() * x_0.float() + (1 - alpha).sqrt() * noise.float()).to(x_0.dtype)

    def _alpha(self, t: Tensor, like: Tensor) -> Tensor:
        return self.alphas.to(like.device)[t.to(like.device)].reshape(-1, *[1] * (like.dim() - 1))

    def _runs(self, context: Tensor, empty: Tensor, generator: Any, extra: Any, steps: int, guidance: float) -> Iterator[Tensor]:
        seeds = torch.randint(1 << 31, (len(context),), generator=generator).tolist()
        start = torch.stack([torch.randn(4, self.side, self.side, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return ddim.runs(self, self.alphas, start.to(self.device, self.dtype), context, empty, extra, steps, guidance)

    def trajectory(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        points = []
        for x in self._runs(context, empty, generator, extra, 25, 3.0):
            points.append(x)
            if on_step is not None:
                on_step()
        return torch.stack(points[:-1]), ddim.timesteps(25, self.timesteps).to(self.device)

    def drawn(
        self, context: Tensor, empty: Tensor, generator: Any, extra: Any = None, *, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        for x in self._runs(context, empty, generator, extra, 50, 7.5):  # noqa: B007
            if on_step is not None:
                on_step()
        return x


def _copied(saved: Tensor) -> Tensor:
    """What the backward pass keeps: Forge's UNets add in place, to tensors that it needs."""
    return saved if isinstance(saved, nn.Parameter) else saved.clone()


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


@contextmanager
def job(name: str) -> Iterator[None]:
    """The host's queue for as long as the block runs."""
    with call_queue.queue_lock:
        shared.state.begin(name)
        try:
            yield
        finally:
            shared.state.end()


def check_interrupted() -> None:
    """Raise :class:`Interrupted` once the user interrupts."""
    if shared.state.interrupted or shared.state.stopping_generation:
        raise Interrupted


def interrupt() -> None:
    shared.state.interrupt()


@contextmanager
def loaded_model() -> Iterator[LoadedModel]:
    """The model in the UI, whole on its device and with gradients possible, for as long as the block runs.

    Raises:
        SepMEError: see :class:`LoadedModel`.
    """
    model = shared.sd_model
    if is_forge(model):
        model.forge_objects = model.forge_objects_original.shallow_copy()
        _load_forge(model.forge_objects.unet, torch.zeros(4, 4, 128, 128))
        _plain(unet_of(model))
    with torch.inference_mode(False), torch.enable_grad(), _no_checkpointing(model):
        loaded = LoadedModel(model)
        asked = [p for p in loaded.unet.parameters() if p.requires_grad]
        try:
            for parameter in asked:
                parameter.requires_grad_(False)
            yield loaded
        finally:
            for parameter in asked:
                parameter.requires_grad_(True)


def _plain(unet: nn.Module) -> None:
    """Forge loads under inference mode, and such parameters cannot take part in a graph: put equal ones in their place."""
    with torch.inference_mode(False):
        for module in unet.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None and value.is_inference():
                        plain = value.detach().clone()
                        held[name] = nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain


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
