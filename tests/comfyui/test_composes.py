"""Deltas beside everything else that people put on a MODEL or into a CONDITIONING.

Two things must hold with each of them: with all toggles off every bit is as without SepME, and with the gate off the result is that
of merged weights, which ComfyUI's own weight patches make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui.inside import Inside
from torch import Tensor

pytestmark = pytest.mark.xdist_group("comfyui inside")

OFF = {"star": 0.0, "openmoji": 0.0}
Extension = Callable[[Inside, Any], Any]


def lora(inside: Inside, model: Any) -> Any:
    """A LoRA on the very projections that deltas act on, and on others."""
    generator = torch.Generator().manual_seed(3)
    keys = [k for k in model.model.state_dict() if k.endswith(("to_k.weight", "to_v.weight", "to_q.weight"))]
    shapes = {k: model.model.state_dict()[k].shape for k in keys}
    clone = model.clone()
    clone.add_patches({k: (0.02 * torch.randn(shape, generator=generator),) for k, shape in shapes.items()}, 0.7)
    return clone


def free_u(inside: Inside, model: Any) -> Any:
    from comfy_extras.nodes_freelunch import FreeU_V2

    return (
        FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0] if hasattr(FreeU_V2, "execute") else FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]
    )


def pag(inside: Inside, model: Any) -> Any:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    node = PerturbedAttentionGuidance
    return node.execute(model, 2.0)[0] if hasattr(node, "execute") else node().patch(model, 2.0)[0]


def ip_adapter(inside: Inside, model: Any) -> Any:
    """What IPAdapter does: attn2_replace, attention to the text and to image tokens of its own."""
    from comfy.ldm.modules.attention import optimized_attention

    clone = model.clone()
    image = torch.randn(1, 4, 192, generator=torch.Generator().manual_seed(4))

    def replace(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        keys = image.expand(len(q), -1, -1).repeat(1, 1, 2)[..., : q.shape[-1]]
        return optimized_attention(q, k, v, options["n_heads"]) + 0.3 * optimized_attention(q, keys, keys, options["n_heads"])

    for block, number in (("input", 1), ("output", 2), ("middle", 0)):
        clone.set_model_attn2_replace(replace, block, number)
    return clone


def neg_pip(inside: Inside, model: Any) -> Any:
    """What NegPip does: keys and values read different tokens, here the values' negated from the third on."""

    def patch(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.stack([context, torch.cat([value[:, :2], -value[:, 2:]], dim=1)], dim=2).flatten(1, 2)
        return n, both[:, 0::2], both[:, 1::2]

    clone = model.clone()
    clone.set_model_attn2_patch(patch)
    return clone


def hypernetwork(inside: Inside, model: Any) -> Any:
    """Other keys and other values, of new tensors in every layer."""

    def patch(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return n, context * 1.1, value * 0.9

    clone = model.clone()
    clone.set_model_attn2_patch(patch)
    return clone


def writing(inside: Inside, model: Any) -> Any:
    """Keys scaled and values turned round in place, in every step anew."""
    from comfy.ldm.modules.attention import optimized_attention

    clone = model.clone()

    def replace(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        k.mul_(1.1)
        v[:, 2:] *= -1
        return optimized_attention(q, k, v, options["n_heads"])

    for block, number in (("input", 1), ("output", 2), ("middle", 0)):
        clone.set_model_attn2_replace(replace, block, number)
    return clone


def couple(inside: Inside, model: Any) -> Any:
    """What attention couple does: in the conditional rows a second prompt, in rows of its own, each for one half of the picture."""
    second = inside.text("an openmoji tulip")[0][0]

    def expand(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        size = len(context) // len(options["cond_or_uncond"])
        queries, contexts = [], []
        for kind, q, c in zip(options["cond_or_uncond"], n.split(size), context.split(size), strict=True):
            queries += [q] if kind == 1 else [q, q]
            contexts += [c] if kind == 1 else [c, second.to(c).expand(size, -1, -1)]
        return torch.cat(queries), torch.cat(contexts), torch.cat(contexts)

    def join(out: Tensor, options: dict[str, Any]) -> Tensor:
        size = len(out) // sum(1 if kind == 1 else 2 for kind in options["cond_or_uncond"])
        parts, result = list(out.split(size)), []
        for kind in options["cond_or_uncond"]:
            result.append(parts.pop(0) if kind == 1 else 0.5 * (parts.pop(0) + parts.pop(0)))
        return torch.cat(result)

    clone = model.clone()
    clone.set_model_attn2_patch(expand)
    clone.set_model_attn2_output_patch(join)
    return clone


def merge(inside: Inside, model: Any) -> Any:
    """ModelMergeSimple with another model of the same kind."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    with torch.inference_mode():
        other = lora(inside, inside.model)
        return ModelMergeSimple().merge(model, other, 0.6)[0]


def partly_loaded(inside: Inside, model: Any) -> Any:
    """Weights beyond a few hundred kB stay where they are, and are cast at every use."""
    clone = model.clone()

    class Partly(type(clone)):  # type: ignore[misc]
        def load(self, device_to: Any = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False, **more: Any) -> None:
            super().load(device_to, 300_000, force_patch_weights, full_load=False)
            assert self.model.model_lowvram

    clone.__class__ = Partly
    return clone


EXTENSIONS: dict[str, Extension] = {
    f.__name__: f for f in (lora, free_u, pag, ip_adapter, neg_pip, hypernetwork, writing, couple, merge, partly_loaded)
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", EXTENSIONS)
def test_beside_other_extensions(inside: Inside, name: str, order: str) -> None:
    extend, prompt = EXTENSIONS[name], inside.text("an openmoji star")

    def both(**options: Any) -> Any:
        if order == "before":
            return inside.apply(extend(inside, inside.model), **options)
        return extend(inside, inside.apply(inside.model, **options))

    stock = inside.sample(extend(inside, inside.model), prompt, batch=2)
    assert not torch.equal(stock, inside.sample(inside.model, prompt, batch=2)) or name == "partly_loaded"
    assert torch.equal(inside.sample(both(toggles=OFF), prompt, batch=2), stock)
    expected = inside.sample(inside.merged(extend(inside, inside.model), [1.0, 0.5]), prompt, batch=2)
    found = inside.sample(both(toggles={"openmoji": 0.5}, gate=False), prompt, batch=2)
    change = (expected - stock).abs().max()
    assert change > 0.01
    assert (found - expected).abs().max() < 2e-3 * change
    assert torch.equal(inside.sample(extend(inside, inside.model), prompt, batch=2), stock)


CONDITIONS: dict[str, Callable[[Inside], list[Any]]] = {
    "long": lambda i: i.text("an openmoji star, " + "a picture on a table in the morning, " * 12),
    "weighted": lambda i: i.text("a (openmoji:1.3) [star] (on a table:0.6)"),
    "time range": lambda i: i.text("an openmoji star", start_percent=0.2, end_percent=0.8) + i.text("a star", start_percent=0.5),
    "mask": lambda i: i.text("an openmoji star", mask=torch.ones(1, 8, 8)) + i.text("a star", mask=torch.eye(8)[None], mask_strength=0.7),
    "average": lambda i: average(i.text("an openmoji star"), i.text("a church")),
    "concat": lambda i: [[torch.cat([a[0], b[0]], dim=1), a[1]] for a, b in zip(i.text("a star"), i.text("openmoji"), strict=True)],
    "control net": lambda i: control(i, i.text("an openmoji star")),
}


def average(to: list[Any], source: list[Any]) -> list[Any]:
    import nodes

    with torch.inference_mode():
        averaged: list[Any] = nodes.ConditioningAverage().addWeighted(to, source, 0.7)[0]
        return averaged


def control(inside: Inside, conditioning: list[Any]) -> list[Any]:
    """A seeded ControlNet of the demo model's shape."""
    import comfy.cldm.cldm
    import comfy.controlnet

    import nodes

    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(6)
        wanted = {
            k: v
            for k, v in inside.model.model.model_config.unet_config.items()
            if k not in ("out_channels", "dtype", "transformer_depth_output")
        }
        net = comfy.cldm.cldm.ControlNet(**wanted, hint_channels=3, dtype=torch.float32)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.05)
        wrapped = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=None)
        hinted: list[Any] = nodes.ControlNetApply().apply_controlnet(conditioning, wrapped, torch.rand(1, 64, 64, 3), 0.8)[0]
        return hinted


@pytest.mark.parametrize("name", CONDITIONS)
def test_with_conditions(inside: Inside, name: str) -> None:
    prompt = CONDITIONS[name](inside)
    plain = inside.sample(inside.model, inside.text("an openmoji star"))
    stock = inside.sample(inside.model, prompt)
    assert not torch.equal(stock, plain)
    assert torch.equal(inside.sample(inside.apply(inside.model, OFF), prompt), stock)
    expected = inside.sample(inside.merged(inside.model, [1.0, 0.5]), prompt)
    found = inside.sample(inside.apply(inside.model, {"openmoji": 0.5}, gate=False), prompt)
    change = (expected - stock).abs().max()
    assert change > 0.01
    assert (found - expected).abs().max() < 2e-3 * change


def test_couples_rows_have_their_prompts_toggles(inside: Inside, caplog: pytest.LogCaptureFixture) -> None:
    """The batch's own prompts keep their toggles in the rows that couple made; the added prompt gets the node's, and the log says so."""
    applied = inside.apply(inside.model, {"star": 1.0, "openmoji": 1.0}, gate=False)
    prompt, negative = inside.toggled("an openmoji star", OFF), inside.toggled("", {"star": 0.3, "openmoji": 0.0})
    for _ in range(2):
        found = inside.sample(couple(inside, applied), prompt, negative, batch=2)
    assert len([r for r in caplog.records if "attention couple" in r.message]) == 1
    same = inside.sample(couple(inside, inside.apply(inside.model, OFF)), inside.text("an openmoji star"), batch=2)
    assert not torch.equal(found, same)
    uniform = {"star": 0.3, "openmoji": 0.0}
    caplog.clear()
    inside.sample(couple(inside, inside.apply(inside.model, uniform)), inside.text("an openmoji star"), inside.text(""))
    assert not caplog.records  # all rows alike: nothing to fall back from


def test_weights_stored_as_fp8(inside: Inside) -> None:
    """A UNet whose weights are float8 and cast at every use."""
    plain = inside.sample(inside.model, inside.text("an openmoji star"))
    model = inside.host.demo_model()[0]
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear) and "attn" in name:
            module.weight = torch.nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
            module.comfy_cast_weights = True
    prompt = inside.text("an openmoji star")
    stock = inside.sample(model, prompt)
    assert not torch.equal(stock, plain)
    assert torch.equal(inside.sample(inside.apply(model, OFF), prompt), stock)
    erased = inside.sample(inside.apply(inside.model, gate=False), prompt)
    found = inside.sample(inside.apply(model, gate=False), prompt)
    # the same change as in full precision, but for what float8 rounds
    assert torch.nn.functional.cosine_similarity((found - stock).flatten(), (erased - plain).flatten(), dim=0) > 0.9


def test_weight_hooks(inside: Inside) -> None:
    """ComfyUI's hooks write other weights into the model in the middle of a run; nothing stale is used."""
    import comfy.hooks

    keys = [f"diffusion_model.{n}.weight" for n in inside.deltas[0].up]
    generator = torch.Generator().manual_seed(8)
    patches = {k: (0.05 * torch.randn(inside.model.model.state_dict()[k].shape, generator=generator),) for k in keys}

    def hooked(prompt: list[Any]) -> list[Any]:
        group = comfy.hooks.HookGroup()
        hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
        hook.weights = patches
        group.add(hook)
        keyframes = comfy.hooks.HookKeyframeGroup()
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
        group.set_keyframes_on_hooks(keyframes)
        return [[c, {**d, "hooks": group}] for c, d in prompt]

    prompt = inside.text("an openmoji star")
    stock = inside.sample(inside.model, hooked(prompt), steps=4)
    assert not torch.equal(stock, inside.sample(inside.model, prompt, steps=4))
    assert torch.equal(inside.sample(inside.apply(inside.model, OFF), hooked(prompt), steps=4), stock)
    expected = inside.sample(inside.merged(inside.model, [1.0, 1.0]), hooked(prompt), steps=4)
    found = inside.sample(inside.apply(inside.model, gate=False), hooked(prompt), steps=4)
    assert (found - expected).abs().max() < 2e-3 * (expected - stock).abs().max()
