"""Published methods and baselines under their keys: closed forms against what they minimise, sets of concepts on a real (tiny) host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepme.concepts import Concept, ConceptBook
from sepme.errors import SepMEError
from sepme.evaluate.closed_forms import speed, uce
from sepme.evaluate.erasers import Merged, Separable, without
from sepme.evaluate.methods import KEYS, MethodMaker
from sepme.hosts.diffusers import DiffusersHost
from sepme.model.layers import weights
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner

Hosts = Callable[..., DiffusersHost]
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in ("tree", "star")), preserve=("the moon",))
PLAN = PlanOptions(mode="tolerance", tolerance=0.01)
QUICK = {"steps": 2, "batch": 1, "trajectories": 2}
TRAINED = [k for k in KEYS if k not in ("uce", "speed", "negative_prompt", "keyword_filter", "lora_sum")]


@pytest.fixture(scope="module")
def host(make_host: Hosts) -> DiffusersHost:
    return make_host()


@pytest.fixture(scope="module")
def maker(host: DiffusersHost, tmp_path_factory: pytest.TempPathFactory) -> MethodMaker:
    settings: dict[str, dict[str, Any]] = {k: dict(QUICK) for k in [*TRAINED, "lora_sum"]}
    settings["sepme_closed_form"] = {}
    for key in ("esd", "sdd", "ablation", "fmn"):
        settings[key] |= {"learning_rate": 0.05, "source": "trajectory"}
    settings["ablation"]["anchor"] = settings["ablation_wd"]["anchor"] = "a house"
    return MethodMaker(host, BOOK, PLAN, tmp_path_factory.mktemp("methods"), settings)


def rows(host: DiffusersHost, *prompts: str) -> Tensor:
    return host.encode(prompts).context.double().flatten(0, 1)


def test_uce_is_its_minimum(host: DiffusersHost) -> None:
    """The gradient of ``Σ‖W'c − Wc*‖² + p Σ‖W'k − Wk‖² + λ‖W' − W‖²`` vanishes there."""
    planner, kv = Planner(host, BOOK, PLAN, ()), weights(host.attention_layers())
    changes = uce(planner, kv, ridge=0.1, preserve=2.0)(frozenset({"tree"}))
    c, target = rows(host, "tree", "a tree"), rows(host, "", "")
    known = rows(host, "", "the moon", "star", "a star")
    for name, weight in kv.items():
        old = weight.double()
        new = (old + changes[name].double()).requires_grad_(True)
        loss = (c @ new.T - target @ old.T).square().sum() + 2 * (known @ (new - old).T).square().sum() + 0.1 * (new - old).square().sum()
        (gradient,) = torch.autograd.grad(loss, new)
        (start,) = torch.autograd.grad((c @ (w := old.clone().requires_grad_(True)).T - target @ old.T).square().sum(), w)
        assert gradient.abs().max() < 1e-4 * start.abs().max()
        assert changes[name].abs().max() > 0


def test_speed_spares_and_minimises(host: DiffusersHost) -> None:
    """Values only; nothing kept moves; the gradient of ``Σ‖W'c − Wc*‖² + μ‖W' − W‖²`` vanishes inside the null space."""
    planner, kv = Planner(host, BOOK, PlanOptions(mode="exact"), ()), weights(host.attention_layers())
    changes = speed(planner, kv, ridge=1e-2)(frozenset({"tree"}))
    assert sorted(changes) == sorted(n for n in kv if n.endswith(".to_v"))
    c, target = rows(host, "tree", "a tree"), rows(host, "", "")
    known = rows(host, "", "the moon", "star", "a star")
    _, values, right = torch.linalg.svd(known)
    inside = right[int((values > 1e-6 * values[0]).sum()) :]
    mu = 1e-2 * (c @ inside.T).square().sum() / len(inside)
    for name, change in changes.items():
        old = kv[name].double()
        assert (known @ change.double().T).abs().max() < 1e-4 * (c @ change.double().T).abs().max()
        new = (old + change.double()).requires_grad_(True)
        loss = (c @ new.T - target @ old.T).square().sum() + mu * (new - old).square().sum()
        (gradient,) = torch.autograd.grad(loss, new)
        assert (gradient @ inside.T).abs().max() < 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("key", KEYS)
def test_every_method_erases_a_set(key: str, maker: MethodMaker, host: DiffusersHost) -> None:
    """The concept changes; with nothing erased the pictures are the stock model's, bit for bit; the model is left as it was."""
    made = maker.make(key)
    before = {n: w.clone() for n, w in weights(host.attention_layers()).items()}
    prompts, options = ["a tree", "the moon"], {"steps": 2, "latents_only": True}
    stock = host.generate(prompts, [1, 2], **options)
    erased = made.eraser.generate(host, prompts, [1, 2], ["tree"], True, **options)
    assert not torch.equal(erased[0], stock[0])
    assert torch.equal(made.eraser.generate(host, prompts, [1, 2], [], True, **options), stock)
    if made.eraser.gated or key == "keyword_filter":
        assert torch.equal(erased[1], stock[1])
    assert all(torch.equal(w, before[n]) for n, w in weights(host.attention_layers()).items())
    assert made.seconds >= 0
    assert made.eraser.bytes > 0 or key in ("negative_prompt", "keyword_filter")


@pytest.mark.parametrize("key", ["sepme_closed_form", "uce", "negative_prompt"])
def test_acting_is_what_generation_does(key: str, maker: MethodMaker, host: DiffusersHost) -> None:
    """One pass with the eraser acting: differentiable by the context, gate in the loop, the same as the projector's keys and values."""
    eraser = maker.make(key).eraser
    context = torch.cat([host.encode(["a tree"]).context, host.encode(["the moon"]).context]).requires_grad_(True)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    with torch.no_grad():
        stock = host.predict(x, t, context)
    with eraser.acting(host, ["tree"], True):
        out = host.predict(x, t, context)
        out[0].square().sum().backward()
    assert context.grad is not None
    assert context.grad[0].abs().max() > 0
    if key == "negative_prompt":
        assert torch.equal(out, stock)
        return
    assert (out[0] - stock[0]).abs().max() > 1e-4
    if isinstance(eraser, Separable):
        from sepme.apply.projector import KVProjector

        assert torch.allclose(out[1], stock[1], atol=1e-6)
        layers = host.attention_layers()
        with torch.no_grad(), KVProjector(layers, eraser.composition).attached(torch.tensor([1.0, 0.0])):
            torch.testing.assert_close(out.detach(), host.predict(x, t, context), rtol=1e-4, atol=1e-5)


def test_published_forms_add_up(maker: MethodMaker) -> None:
    """One concept: its own fine-tuning; all: the one of all."""
    eraser = maker.make("esd").eraser
    assert isinstance(eraser, Merged)
    tree, star, both = (eraser.changes(frozenset(s)) for s in (["tree"], ["star"], ["tree", "star"]))
    name = next(iter(tree))
    assert not torch.equal(tree[name], star[name])
    assert not torch.equal(both[name], tree[name] + star[name])
    lora = maker.make("lora_sum").eraser.changes
    assert torch.equal(lora(frozenset(["tree", "star"]))[name], lora(frozenset(["star"]))[name] + lora(frozenset(["tree"]))[name])
    assert torch.linalg.matrix_rank(lora(frozenset(["tree"]))[name]) == 4


def test_nothing_is_made_twice(maker: MethodMaker, host: DiffusersHost) -> None:
    """A second one on the same folder trains nothing, also under other settings for another method; other settings train again."""
    first, *_ = [maker.make(method) for method in ("esd_wd", "esd", "lora_sum")]
    passes: list[int] = []
    handle = host.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        again = MethodMaker(host, BOOK, PLAN, maker.folder, maker.settings)
        assert again.make("esd_wd").seconds == first.seconds
        again.make("esd")
        again.make("lora_sum")
        assert passes == []
        MethodMaker(host, BOOK, PLAN, maker.folder, {"esd_wd": QUICK | {"steps": 1}}).make("esd_wd")
        assert passes
    finally:
        handle.remove()


def test_keyword_filter() -> None:
    assert without("a Star, star style", ["star"]) == "a , style"
    assert without("a  starry  night", ["star"]) == "a  starry  night"
    assert without("big star", ["star", "big star"]) == ""


def test_unknown_methods_and_settings(host: DiffusersHost, tmp_path: Path) -> None:
    with pytest.raises(SepMEError, match="no method 'magic'"):
        MethodMaker(host, BOOK, PLAN, tmp_path).make("magic")
    with pytest.raises(SepMEError, match="no method 'magic'"):
        MethodMaker(host, BOOK, PLAN, tmp_path, {"magic": {}})
    with pytest.raises(SepMEError, match="unknown entry"):
        MethodMaker(host, BOOK, PLAN, tmp_path, {"esd": {"step": 3}}).make("esd")
