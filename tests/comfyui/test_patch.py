"""Deltas on a MODEL inside ComfyUI: exactness, rows, forward counts, what is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui.inside import PRESERVED, Inside
from torch import Tensor

pytestmark = pytest.mark.xdist_group("comfyui inside")

STAR, OPENMOJI = {"star": 1.0, "openmoji": 0.0}, {"star": 0.0, "openmoji": 1.0}
OFF = {"star": 0.0, "openmoji": 0.0}


def counted(model: Any) -> tuple[Any, list[int]]:
    """A clone that notes the number of rows of every forward pass."""
    clone, rows = model.clone(), []

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        rows.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(wrapper)
    return clone, rows


# --- exactness


def test_off_is_stock(inside: Inside) -> None:
    prompt = inside.text("an openmoji star")
    stock = inside.sample(inside.model, prompt, batch=2)
    assert torch.equal(inside.sample(inside.apply(inside.model, OFF), prompt, batch=2), stock)
    assert torch.equal(inside.sample(inside.apply(inside.model), inside.toggled("an openmoji star", OFF), batch=2), stock)
    erased = inside.sample(inside.apply(inside.model), prompt, batch=2)
    assert not any(torch.equal(a, b) for a, b in zip(erased, stock, strict=True))
    assert torch.equal(inside.sample(inside.model, prompt, batch=2), stock)


def test_closed_gate_is_stock(inside: Inside) -> None:
    for text in (*PRESERVED, ""):
        prompt = inside.text(text)
        assert torch.equal(inside.sample(inside.apply(inside.model), prompt), inside.sample(inside.model, prompt))
    prompt = inside.text(PRESERVED[0])
    assert not torch.equal(inside.sample(inside.apply(inside.model, gate=False), prompt), inside.sample(inside.model, prompt))


@pytest.mark.parametrize("toggles", [STAR, OPENMOJI, {"star": 0.5, "openmoji": 1.0}, {"star": -0.5, "openmoji": 2.0}])
def test_linear_deltas_are_merged_weights(inside: Inside, toggles: dict[str, float]) -> None:
    """Gate off, every row the same: ComfyUI's own weight patches give the same up to rounding."""
    prompt = inside.text("an openmoji star")
    stock = inside.sample(inside.model, prompt)
    expected = inside.sample(inside.merged(inside.model, list(toggles.values())), prompt)
    found = inside.sample(inside.apply(inside.model, toggles, gate=False), prompt)
    change = (expected - stock).abs().max()
    assert change > 0.01
    assert (found - expected).abs().max() < 1e-3 * change


def test_two_apply_nodes_are_one(inside: Inside) -> None:
    prompt = inside.text("an openmoji star")
    first = inside.host.apply_deltas(inside.model, inside.deltas[:1], {"star": 0.5})
    both = inside.host.apply_deltas(first, inside.deltas[1:], {})
    assert torch.equal(inside.sample(both, prompt), inside.sample(inside.apply(inside.model, {"star": 0.5, "openmoji": 1.0}), prompt))
    with pytest.raises(ValueError, match="Two deltas erase 'star'"):
        inside.apply(first)
    alone = inside.host.apply_deltas(inside.model, inside.deltas[:1], {"star": 0.5})
    assert torch.equal(inside.sample(first, prompt), inside.sample(alone, prompt))  # as it was before the second


# --- every prompt its own toggles, one batch


def test_mixed_toggles_in_one_batch(inside: Inside) -> None:
    """Positive and negative with toggles of their own: one forward a step, and each row what it is when all rows have its toggles."""
    applied, rows = counted(inside.apply(inside.model, gate=False))

    def denoised(positive: dict[str, float], negative: dict[str, float]) -> Tensor:
        """Conditional and unconditional prediction of the first step, from which all rows of the batch follow."""
        seen: list[Tensor] = []
        clone = applied.clone()
        clone.set_model_sampler_cfg_function(lambda args: (seen.append(torch.cat([args["cond"], args["uncond"]])), args["cond"])[1])
        inside.sample(clone, inside.toggled("an openmoji star", positive), inside.toggled("a star", negative), steps=1, batch=2)
        return seen[0]

    mixed = denoised(STAR, OPENMOJI)
    assert rows == [4]
    assert torch.equal(mixed[:2], denoised(STAR, STAR)[:2])
    assert torch.equal(mixed[2:], denoised(OPENMOJI, OPENMOJI)[2:])
    assert not torch.equal(mixed[:2], denoised(OPENMOJI, OPENMOJI)[:2])
    assert not torch.equal(mixed[2:], denoised(STAR, STAR)[2:])
    assert torch.equal(denoised(OFF, STAR)[:2], denoised(OFF, OFF)[:2])


@pytest.mark.parametrize("kind", ["pair", "combined", "area", "mask", "range", "one with toggles"])
def test_forward_counts_are_stock(inside: Inside, kind: str) -> None:
    """As many forwards per step, with as many rows, as without deltas; toggles differ in every prompt."""
    area = {"area": (8, 4, 0, 0)}
    mask = torch.ones(1, 8, 8)
    positive = {
        "pair": inside.toggled("an openmoji star", STAR),
        "combined": inside.toggled("an openmoji star", STAR) + inside.toggled("a star", OPENMOJI),
        "area": inside.toggled("an openmoji star", STAR, **area) + inside.toggled("a star", OPENMOJI, area=(8, 4, 0, 4)),
        "mask": inside.toggled("an openmoji star", STAR, mask=mask) + inside.toggled("a star", OPENMOJI, mask=mask, mask_strength=0.5),
        "range": inside.toggled("an openmoji star", STAR, start_percent=0.0, end_percent=0.5) + inside.toggled("a star", OPENMOJI),
        "one with toggles": inside.text("an openmoji star") + inside.toggled("a star", OPENMOJI) + inside.text("a star"),
    }[kind]
    stock, stock_rows = counted(inside.model)
    applied, rows = counted(inside.apply(inside.model, gate=False))
    before = inside.sample(stock, positive, batch=2)
    after = inside.sample(applied, positive, inside.toggled("a church", OFF), batch=2)
    assert rows == stock_rows
    assert not torch.equal(before, after)
    off = inside.apply(inside.model, OFF)
    for part in positive:
        part[1].pop("sepme", None)
    assert torch.equal(inside.sample(off, positive, batch=2), inside.sample(stock, positive, batch=2))


def test_an_areas_negative_has_the_negatives_toggles(inside: Inside) -> None:
    """ComfyUI makes a negative for every area; it is the negative prompt, and keeps its toggles."""
    seen: list[Tensor] = []
    applied = inside.apply(inside.model, gate=False)
    module = inside.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2

    def note(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        if options["block"][0] == "middle":
            seen.append(module.to_v(context).clone())
            seen.append(torch.tensor(options["cond_or_uncond"]))
        return n, context, value

    applied.set_model_attn2_patch(note)
    positive = inside.toggled("a star", STAR, area=(8, 4, 0, 0)) + inside.toggled("a star", OFF, area=(8, 4, 0, 4))
    inside.sample(applied, positive, inside.toggled("a star", OPENMOJI), steps=1)
    values = {(int(k), i): v for i, (vs, ks) in enumerate(zip(seen[::2], seen[1::2], strict=True)) for k, v in zip(ks, vs, strict=True)}
    negatives = [v for (kind, _), v in values.items() if kind == 1]
    assert len(negatives) >= 1
    only = []

    def note_one(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        if options["block"][0] == "middle":
            only.append(module.to_v(context)[options["cond_or_uncond"].index(1)].clone())
        return n, context, value

    reference = inside.apply(inside.model, OPENMOJI, gate=False)
    reference.set_model_attn2_patch(note_one)
    positive = inside.text("a star", area=(8, 4, 0, 0)) + inside.text("a star", area=(8, 4, 0, 4))
    inside.sample(reference, positive, inside.text("a star"), steps=1)
    assert all(torch.equal(v, only[0]) for v in negatives)


def test_toggles_of_text_beat_conditioning_beat_node(inside: Inside) -> None:
    nodes = inside.host
    prompt = nodes.toggled(nodes.toggled(inside.text("an openmoji star"), {"STAR": 0.25}, {"star": 0.5}), {"star": 1.0, "Openmoji": 0.0})
    found = inside.sample(inside.apply(inside.model, {"star": 0.0, "openmoji": 1.0}), prompt, inside.toggled("", OFF))
    expected = inside.sample(inside.apply(inside.model, {"star": 0.5, "openmoji": 0.0}), inside.text("an openmoji star"))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="no concept 'moon' here; loaded concepts: star, openmoji"):
        inside.sample(inside.apply(inside.model), inside.toggled("a star", {"moon": 1.0}))


# --- what is left behind


def patches_of(model: Any) -> dict[str, Any]:
    """All instance attributes that could have been patched."""
    found = {"extra_conds": model.__dict__.get("extra_conds"), "apply_model": model.__dict__.get("apply_model")}
    for name, module in model.diffusion_model.named_modules():
        forward = module.__dict__.get("forward")
        if forward is not None and forward != type(module).forward.__get__(module):
            found[name] = forward
    return {k: v for k, v in found.items() if v is not None and v != getattr(type(model), k, lambda: None).__get__(model)}


def test_the_model_is_left_as_found(inside: Inside) -> None:
    prompt = inside.text("an openmoji star")
    stock = inside.sample(inside.model, prompt)
    keys, weights = list(inside.model.model.state_dict()), {n: p.clone() for n, p in inside.model.model.named_parameters()}
    applied = inside.apply(inside.model)
    assert inside.model.object_patches == {}
    assert inside.model.wrappers == {}
    assert inside.model.attachments == {}
    inside.sample(applied, prompt)
    assert list(inside.model.model.state_dict()) == keys
    assert torch.equal(inside.sample(inside.model, prompt), stock)
    assert patches_of(inside.model.model) == {}
    assert all(torch.equal(p, weights[n]) for n, p in inside.model.model.named_parameters())


def test_between_runs_a_live_patch_does_nothing(inside: Inside) -> None:
    """A patch stays on the model until another MODEL is loaded; who calls the UNet meanwhile gets stock results."""
    context, x, t = inside.text("an openmoji star")[0][0], torch.randn(1, 4, 8, 8), torch.tensor([500])
    inside.sample(inside.model, inside.text("a star"))
    unet = inside.model.model.diffusion_model
    with torch.inference_mode():
        stock = unet(x, t, context=context)
    inside.sample(inside.apply(inside.model), inside.text("an openmoji star"))
    assert patches_of(inside.model.model)
    with torch.inference_mode():
        assert torch.equal(unet(x, t, context=context), stock)
        assert "sepme" not in inside.model.model.extra_conds(cross_attn=context, noise=x, device="cpu")


def test_deep_copies_of_a_patched_model(inside: Inside) -> None:
    """Hosts with several GPUs copy the model, patches and all: a copy uses its own weights, and carries the same deltas."""
    applied, prompt = inside.apply(inside.model), inside.text("an openmoji star")
    expected, stock = inside.sample(applied, prompt), inside.sample(inside.model, prompt)
    try:
        copy.deepcopy(inside.model.model)
    except TypeError:
        pytest.skip("models of this ComfyUI cannot be copied at all")
    inside.sample(applied, prompt)  # live on the model
    copied = applied.clone()
    copied.model = copy.deepcopy(inside.model.model)
    copied.object_patches_backup = {}
    assert torch.equal(inside.sample(copied, prompt), expected)
    inside.sample(applied, prompt)
    unet, context = copy.deepcopy(inside.model.model).diffusion_model, prompt[0][0]
    with torch.inference_mode():
        arguments = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
        before = unet(*arguments, context=context)
        for name, module in unet.named_modules():
            if name.endswith("attn2.to_v"):
                module.weight = torch.nn.Parameter(module.weight * 0, requires_grad=False)
        assert not torch.equal(unet(*arguments, context=context), before)
    assert torch.equal(inside.sample(inside.model, prompt), stock)


def test_a_run_that_fails_leaves_nothing_on(inside: Inside) -> None:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError

    prompt = inside.text("an openmoji star")
    applied = inside.apply(inside.model)
    broken = applied.clone()
    broken.set_model_attn2_output_patch(fail)
    with pytest.raises(ZeroDivisionError):
        inside.sample(broken, prompt)
    carried = broken.get_attachment("sepme")
    assert not carried._running
    assert carried._projectors == {}
    assert torch.equal(inside.sample(inside.model, prompt), inside.sample(inside.apply(inside.model, OFF), prompt))


def test_no_clone_leaks(inside: Inside) -> None:
    import comfy.model_management

    def one() -> list[weakref.ref[Any]]:
        applied = inside.apply(inside.model)
        inside.sample(applied, inside.text("an openmoji star"))
        return [weakref.ref(applied), weakref.ref(applied.get_attachment("sepme"))]

    references = one()
    inside.sample(inside.model, inside.text("a star"))
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_toggling_reloads_no_weight(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another set of toggles is another clone; ComfyUI finds the same weights in it and loads nothing."""
    import comfy.model_patcher

    lora = {f"diffusion_model.{n}.weight": (torch.randn(inside.deltas[0].up[n].shape[0], 384),) for n in inside.deltas[0].up}
    model = inside.model.clone()
    model.add_patches(lora, 0.01)
    prompt = inside.text("an openmoji star")
    first = inside.sample(inside.apply(model, STAR), prompt)
    loads: list[int] = []
    load = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda self, *a, **k: (loads.append(1), load(self, *a, **k))[1])
    second = inside.sample(inside.apply(model, OPENMOJI), prompt)
    assert loads == []
    assert not torch.equal(first, second)
    assert torch.equal(inside.sample(inside.apply(model, STAR), prompt), first)


# --- keys and values are kept for a run


def test_projections_run_once_a_prompt_batch(inside: Inside) -> None:
    """Seven steps, one call of every to_k and to_v."""
    calls: list[str] = []
    modules = {n: m for n, m in inside.model.model.diffusion_model.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))}

    def noting(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: (calls.append(name), forward(x))[1]

    noted = inside.model.clone()
    for name, module in modules.items():
        noted.add_object_patch(f"diffusion_model.{name}.forward", noting(name, type(module).forward.__get__(module)))
    prompt = inside.text("an openmoji star")
    expected = inside.sample(inside.apply(inside.model, backend="exact"), prompt, steps=7)
    assert torch.equal(inside.sample(inside.apply(noted, backend="exact"), prompt, steps=7), expected)
    assert sorted(calls) == sorted(modules)
    inside.sample(inside.apply(noted, backend="exact"), prompt, steps=7)
    assert len(calls) == 2 * len(modules)  # nothing is kept from run to run


def test_fused_falls_back_and_says_so_once(inside: Inside, caplog: pytest.LogCaptureFixture) -> None:
    applied = inside.apply(inside.model, backend="fused")
    for _ in range(2):
        inside.sample(applied, inside.text("an openmoji star"))
    assert [r.message for r in caplog.records] == ["Backend fused: there is no kernel for cpu; plain PyTorch does the same here."]
    caplog.clear()
    inside.sample(inside.apply(inside.model), inside.text("an openmoji star"))
    assert not caplog.records


@pytest.mark.parametrize("backend", ["auto", "exact", "fused", "eager"])
def test_backends(inside: Inside, backend: str) -> None:
    prompt = inside.text("an openmoji star")
    reference = inside.sample(inside.apply(inside.model, backend="exact"), prompt)
    stock = inside.sample(inside.model, prompt)
    found = inside.sample(inside.apply(inside.model, backend=backend), prompt)
    assert (found - reference).abs().max() < 1e-3 * (reference - stock).abs().max()
    assert torch.equal(inside.sample(inside.apply(inside.model, OFF, backend=backend), prompt), stock)


def test_other_models_are_refused(inside: Inside) -> None:
    class Other:
        diffusion_model = torch.nn.Linear(2, 2)

    foreign = inside.model.clone()
    foreign.model = Other()
    with pytest.raises(ValueError, match=r"no SD1\.x, SD2\.x or SDXL model"):
        inside.host.apply_deltas(foreign, inside.deltas, {})


@pytest.mark.parametrize("how", ["wrapper", "object patch", "a part"])
@pytest.mark.parametrize("first", [True, False])
def test_compiled(inside: Inside, how: str, first: bool) -> None:
    """A MODEL that torch.compile put a module of its own around, before or after SepME Apply: the same bits.

    The compiler itself is off here, it takes minutes on a CPU.
    """
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model: Any) -> Any:
        clone = model.clone()
        if how == "wrapper":
            set_torch_compile_wrapper(model=clone, backend="eager")
        else:
            key = "diffusion_model" if how == "object patch" else "diffusion_model.middle_block.1.transformer_blocks.0"
            clone.add_object_patch(key, torch.compile(clone.get_model_object(key), backend="eager"))
        return clone

    prompt, off = inside.text("a star"), inside.toggled("a star", {"star": 0.0})
    stock, erased = inside.sample(inside.model, prompt), inside.sample(inside.apply(inside.model), prompt)
    assert not torch.equal(stock, erased)
    with torch.compiler.set_stance("force_eager"):
        model = inside.apply(compiled(inside.model)) if first else compiled(inside.apply(inside.model))
        assert torch.equal(inside.sample(model, prompt), erased)
        assert torch.equal(inside.sample(model, off), stock)
    assert torch.equal(inside.sample(inside.model, prompt), stock)
