"""The projector on a real (tiny) pipeline: bit-exact where nothing is erased, K/V cached across steps, the model left as found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepme.apply import projector as projectors
from sepme.apply.composition import Composition
from sepme.apply.forward_pass import MAX_SEEN
from sepme.apply.ops import project_kv
from sepme.apply.projector import BACKENDS, KVProjector
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.model.layers import projections
from sepme.model.patch import patched
from sepme.plan.gate import ratios

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def hosts(make_host: Callable[..., Any]) -> dict[torch.dtype, Any]:
    return {d: make_host(d) for d in DTYPES}


@pytest.fixture(scope="module")
def delta(host: Any, shapes_of: Callable[..., Any], make_random_delta: Callable[..., ConceptDelta]) -> ConceptDelta:
    """Gate 0: open for every prompt."""
    return make_random_delta("star", shapes_of(host), rank=4, seed=1, size=0.5)


@pytest.fixture(scope="module")
def other(host: Any, shapes_of: Callable[..., Any], make_random_delta: Callable[..., ConceptDelta]) -> ConceptDelta:
    return make_random_delta("moon", shapes_of(host), rank=2, seed=2, size=0.5)


def closed(delta: ConceptDelta) -> ConceptDelta:
    return replace(delta, gate=1.0)  # a ratio is at most 1


def batch(host: Any, prompts: list[str], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and context of a batch."""
    x = host.latents([seed + i for i in range(len(prompts))])
    return x, torch.full((len(prompts),), 500), host.encode(prompts).context


@contextmanager
def counted(host: Any) -> Iterator[dict[str, int]]:
    """Counts the calls of the host's own projections, as forwards that were there before ours."""
    calls: dict[str, int] = {}

    def wrap(name: str, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def project(context: Tensor) -> Tensor:
            calls[name] = calls.get(name, 0) + 1
            return forward(context)

        return project

    with patched(projections(host.attention_layers()), wrap):
        yield calls


def forwards(host: Any) -> list[list[tuple[str, int]]]:
    """Everything in the modules' __dict__, by identity and in order."""
    return [[(k, id(v)) for k, v in m.__dict__.items()] for m in host.unet.modules()]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- exactness


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [True, False])
def test_nothing_erased_is_bit_identical(hosts: dict[Any, Any], delta: ConceptDelta, dtype: torch.dtype, keep: bool) -> None:
    """Strength 0, or a closed gate: noise predictions and whole pictures are the stock model's, bit for bit."""
    host = hosts[dtype]
    x, t, context = batch(host, ["a star", "a red cat", ""])
    stock = host.predict(x, t, context)
    picture = host.generate(["a star", "cat"], [1, 2], steps=3)
    for made, strengths in ((delta, torch.zeros(1)), (delta, torch.zeros(3, 1)), (closed(delta), torch.ones(1))):
        with KVProjector(host.attention_layers(), Composition((made,)), keep=keep).attached(strengths):
            for _ in range(2):
                assert torch.equal(host.predict(x, t, context), stock)
    for made, toggles in ((delta, {"star": 0.0}), (closed(delta), {})):
        assert torch.equal(host.generate(["a star", "cat"], [1, 2], Composition((made,)), toggles, steps=3, keep=keep), picture)
    assert not torch.equal(host.generate(["a star", "cat"], [1, 2], Composition((delta,)), steps=3, keep=keep), picture)


@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_rows_of_a_mixed_batch_are_bit_identical(hosts: dict[Any, Any], delta: ConceptDelta, dtype: torch.dtype) -> None:
    """By strength and by gate; the touched row of the same batch changes."""
    host = hosts[dtype]
    x, t, context = batch(host, ["a star", "a red cat", "dog"])
    stock = host.predict(x, t, context)
    statistics = ratios(context, delta.down)
    row = int(statistics.argmax())
    gate = float(statistics.sort().values[1:].mean())
    rest = [i for i in range(3) if i != row]
    by_strength = torch.zeros(3, 1)
    by_strength[row] = 1
    for made, strengths in ((delta, by_strength), (replace(delta, gate=gate), torch.ones(3, 1))):
        with KVProjector(host.attention_layers(), Composition((made,))).attached(strengths):
            erased = host.predict(x, t, context)
        assert torch.equal(erased[rest], stock[rest])
        assert not torch.equal(erased[row], stock[row])


def test_pictures_with_tags(host: Any, delta: ConceptDelta) -> None:
    """A prompt's own tags beat the toggles, row by row; a kept row is the stock picture of the same batch."""
    composition = Composition((delta,))
    stock = host.generate(["a star"] * 3, [1, 2, 3], steps=3)
    mixed = host.generate(
        ["a star <keep:star>", "a star <erase:star:0.5>", "a star"], [1, 2, 3], composition, steps=3, negative="<keep:star>"
    )
    assert torch.equal(mixed[0], stock[0])
    assert not torch.equal(mixed[1], stock[1])
    assert not torch.equal(mixed[2], stock[2])
    assert not torch.equal(mixed[1], host.generate(["a star"] * 3, [1, 2, 3], composition, steps=3, negative="<keep:star>")[1])
    with pytest.raises(SepMEError, match="no concept 'sun' here"):
        host.generate(["a star <erase:sun>"], [1], composition, steps=1)


# --- what touched rows get


def merged(make_host: Callable[..., Any], deltas: tuple[ConceptDelta, ...], strengths: list[float]) -> Any:
    """A fresh pipeline with W + Σ s ΔW."""
    host = make_host()
    for name, module in projections(host.attention_layers()).items():
        for delta, strength in zip(deltas, strengths, strict=True):
            module.weight.data += strength * delta.weight_delta(name)
    return host


def test_equals_merged_weights(host: Any, delta: ConceptDelta, other: ConceptDelta, make_host: Callable[..., Any]) -> None:
    """Per-row strengths (0, partial, negative, above 1), gate off: every row is the model with merged weights."""
    deltas, prompts = (delta, other), ["a star", "a star", "a red cat", ""]
    x, t, context = batch(host, prompts)
    table = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-1.0, 0.3], [2.0, 1.0]])
    stock = host.predict(x, t, context)
    with KVProjector(host.attention_layers(), Composition(deltas), gate=False).attached(table):
        erased = host.predict(x, t, context)
        projected = {n: m(context) for n, m in projections(host.attention_layers()).items()}
    for row, strengths in enumerate(table.tolist()):
        reference = merged(make_host, deltas, strengths)
        expected = reference.predict(x, t, context)[row]
        change = (expected - stock[row]).abs().max()
        assert change > 1e-3
        assert (erased[row] - expected).abs().max() <= 1e-4 * change
        for name, module in projections(reference.attention_layers()).items():
            assert torch.allclose(projected[name][row], module(context)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_touched_rows_are_rounded_once(hosts: dict[Any, Any], delta: ConceptDelta, dtype: torch.dtype) -> None:
    """``W x + s Y Dᵀ x``: the host's product plus a float32 correction, rounded to the model's dtype once."""
    host = hosts[dtype]
    _, _, context = batch(host, ["a star", "dog"])
    modules = projections(host.attention_layers())
    stock = {n: m(context) for n, m in modules.items()}
    with KVProjector(host.attention_layers(), Composition((delta,)), gate=False).attached(torch.tensor([0.5])):
        for name, module in modules.items():
            correction = 0.5 * (context.float() @ delta.down.T) @ delta.up_factor(name).T
            expected = (stock[name].float() + correction).to(dtype)
            found = module(context)
            assert found.dtype == dtype
            assert (found.float() - expected.float()).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_gradients_flow_and_nothing_is_cached(host: Any, delta: ConceptDelta) -> None:
    x, t, context = batch(host, ["a star"])
    projector = KVProjector(host.attention_layers(), Composition((delta,)))
    with projector.attached(), torch.enable_grad():
        point = x.clone().requires_grad_()
        host.predict(point, t, context).square().sum().backward()
        assert projector.cached_bytes == 0
    assert point.grad is not None
    assert point.grad.abs().max() > 0


# --- backends


def plain(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A host's own forward that is no plain product as far as can be seen."""
    return lambda context: forward(context)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(
    hosts: dict[Any, Any], delta: ConceptDelta, other: ConceptDelta, dtype: torch.dtype, keep: bool, backend: str
) -> None:
    """Up to rounding in touched rows; auto (without a kernel) is exact; where the host does more than a product, all are exact."""
    host, composition = hosts[dtype], Composition((delta, other))
    _, _, context = batch(host, ["a star", "a red cat", ""])
    table = torch.tensor([[1.0, 0.5], [0.0, 0.0], [-0.5, 1e-3]])
    modules = projections(host.attention_layers())

    def outputs(backend: str, keep: bool) -> dict[str, Tensor]:
        with KVProjector(host.attention_layers(), composition, keep=keep, backend=backend).attached(table):
            first = {n: m(context) for n, m in modules.items()}
            again = {n: m(context.clone()) for n, m in modules.items()}
        assert all(torch.equal(first[n], again[n]) for n in modules)
        return first

    reference, found = outputs("exact", False), outputs(backend, keep)
    stock = {n: m(context) for n, m in modules.items()}
    for name in modules:
        assert found[name].dtype == dtype
        assert found[name].shape == reference[name].shape
        assert torch.equal(reference[name][1], stock[name][1])
        error = (found[name].double() - reference[name].double()).norm() / reference[name].double().norm()
        assert error <= (1e-6 if dtype == torch.float32 else 8e-3)
        if backend in ("auto", "exact"):
            assert torch.equal(found[name], reference[name])
    with patched(modules, lambda name, module, forward: plain(forward)):
        found = outputs(backend, keep)
    assert all(torch.equal(found[n], reference[n]) for n in modules)


def test_fused_is_one_call_a_prompt(host: Any, delta: ConceptDelta, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers, and none where nothing is erased; auto takes it when every row is touched and a kernel is there."""
    calls: list[int] = []
    monkeypatch.setattr(projectors, "project_kv", lambda *args: calls.append(len(args[1])) or project_kv(*args))
    x, t, context = batch(host, ["a star", "cat"])
    count = len(projections(host.attention_layers()))

    def run(backend: str, table: Tensor) -> list[int]:
        calls.clear()
        with KVProjector(host.attention_layers(), Composition((delta,)), backend=backend).attached(table):
            for _ in range(3):
                host.predict(x, t, context.clone())
        return list(calls)

    both, one, none = torch.ones(1), torch.tensor([[1.0], [0.0]]), torch.zeros(1)
    assert [run("fused", table) for table in (both, one, none)] == [[count], [count], []]
    assert [run("auto", table) for table in (both, one, none)] == [[], [], []]
    monkeypatch.setattr(projectors, "why_not", lambda constraints, **inputs: None)  # as if there were a kernel
    assert [run("auto", table) for table in (both, one, none)] == [[count], [], []]
    assert [run(b, both) for b in ("exact", "eager")] == [[], []]


def test_small_factors_survive_half_precision(make_host: Callable[..., Any], shapes_of: Callable[..., Any], make_random_delta: Any) -> None:
    """A Y of 1e-7 is no normal float16 number; fused must not lose it."""
    host = make_host(torch.float16)
    tiny = make_random_delta("star", shapes_of(host), rank=4, size=1e-7)
    _, _, context = batch(host, ["a star"])
    table, found = torch.tensor([1e6]), {}
    for backend in ("exact", "fused"):
        with KVProjector(host.attention_layers(), Composition((tiny,)), backend=backend).attached(table):
            found[backend] = {n: m(context).double() for n, m in projections(host.attention_layers()).items()}
    for name, exact in found["exact"].items():
        assert (found["fused"][name] - exact).norm() <= 2e-3 * exact.norm()


def test_an_unknown_backend_is_refused(host: Any, delta: ConceptDelta) -> None:
    with pytest.raises(SepMEError, match="no backend 'fast'; choose one of auto, exact, fused, eager"):
        KVProjector(host.attention_layers(), Composition((delta,)), backend="fast")


# --- keys and values are cached


def test_projections_run_once_a_prompt_batch(host: Any, delta: ConceptDelta, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps of a pipeline, one call of every to_k and to_v; without keeping, one per step."""
    names = set(projections(host.attention_layers()))
    with counted(host) as calls:
        host.generate(["a star", "cat"], [1, 2], Composition((delta,)), steps=7)
        assert calls == dict.fromkeys(names, 1)
        cached = host.generate(["a star", "cat"], [1, 2], Composition((delta,)), steps=7)
        assert calls == dict.fromkeys(names, 2)  # another run, nothing left of the first
        fresh = host.generate(["a star", "cat"], [1, 2], Composition((delta,)), steps=7, keep=False)
        assert calls == dict.fromkeys(names, 2 + 7)
        monkeypatch.setenv("SEPME_KEEP", "0")
        switched_off = host.generate(["a star", "cat"], [1, 2], Composition((delta,)), steps=7)
        assert calls == dict.fromkeys(names, 2 + 7 + 7)
    assert torch.equal(cached, fresh)
    assert torch.equal(cached, switched_off)


def test_equal_content_in_a_new_tensor_is_cached(host: Any, delta: ConceptDelta) -> None:
    """Hosts may build the context anew each step, or alternate between batches."""
    x, t, context = batch(host, ["a star", "cat"])
    _, _, second = batch(host, ["dog", "cat"])
    with counted(host) as calls, KVProjector(host.attention_layers(), Composition((delta,))).attached():
        for _ in range(3):
            host.predict(x, t, context.clone())
            host.predict(x, t, second.clone())
        assert set(calls.values()) == {2}
        host.predict(x[:1], t[:1], context[:1].clone())  # another shape is another batch: products round differently
        assert set(calls.values()) == {3}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_changes_is_computed_again(make_host: Callable[..., Any], delta: ConceptDelta, other: ConceptDelta, mode: Any) -> None:
    """Context, strengths and weights, changed in place or replaced, and the dtype: always what a fresh projector gives."""
    host = make_host()
    composition = Composition((delta, other))
    with mode():
        x, t, context = batch(host, ["a star", "cat"])
        table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        module = host.attention_layers()["middle_block.1.transformer_blocks.0.attn2"].to_k
        projector = KVProjector(host.attention_layers(), composition)

        def replace_context(value: Tensor) -> None:
            nonlocal context
            context = value

        def replace_table(value: Tensor) -> None:
            nonlocal table
            table = value

        def double_precision() -> None:
            nonlocal x, context
            host.unet.double()
            x, context = x.double(), context.double()

        changes: list[Callable[[], Any]] = [
            lambda: context.mul_(1.5),
            lambda: context[1, 3].add_(0.5),
            lambda: replace_context(context.flip(0)),
            lambda: table.mul_(0.5),
            lambda: replace_table(table.flip(0)),
            lambda: replace_table(torch.tensor([0.0, -1.0])),
            lambda: module.weight.mul_(1.25),
            lambda: setattr(module, "weight", nn.Parameter(module.weight * 0.5, requires_grad=False)),
            double_precision,
        ]
        last = None
        for change in (lambda: None, *changes):
            change()
            with in_place(host, projector), projector.forward_pass(table):
                now = host.predict(x, t, context)
            with KVProjector(host.attention_layers(), composition, keep=False).attached(table):
                assert torch.equal(now, host.predict(x, t, context))
            assert now.dtype == x.dtype
            assert last is None or not torch.equal(now, last)
            last = now


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_inside_of_the_block_are_noticed(make_host: Callable[..., Any], delta: ConceptDelta, mode: Any) -> None:
    """A model that is called again and again in one block: context, strengths and weights written over between two calls."""
    host = make_host()
    with mode():
        x, t, context = batch(host, ["a star", "cat"])
        table = torch.tensor([[1.0], [0.5]])
        module = host.attention_layers()["middle_block.1.transformer_blocks.0.attn2"].to_k
        changes = (lambda: None, lambda: context.mul_(1.5), lambda: table.mul_(0.5), lambda: module.weight.mul_(1.25))
        found, expected = [], []
        with KVProjector(host.attention_layers(), Composition((delta,))).attached(table):
            for change in changes:
                change()
                found.append((context.clone(), table.clone(), module.weight.clone(), host.predict(x, t, context)))
        for c, strengths, weight, output in found:
            module.weight.copy_(weight)
            with KVProjector(host.attention_layers(), Composition((delta,)), keep=False).attached(strengths):
                expected.append(host.predict(x, t, c))
            assert torch.equal(output, expected[-1])
        assert not any(torch.equal(a, b) for a, b in pairwise(expected))


def test_a_new_weight_at_the_old_address_is_noticed(make_host: Callable[..., Any], delta: ConceptDelta) -> None:
    """Allocators give freed memory again: another parameter at the same address, with the same version counter."""
    host = make_host()
    module = host.attention_layers()["middle_block.1.transformer_blocks.0.attn2"].to_k
    context = host.encode(["a star"]).context
    memory = module.weight.numpy().copy()
    module.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    state = (module.weight.data_ptr(), module.weight._version)
    with KVProjector(host.attention_layers(), Composition((closed(delta),))).attached():
        before = module(context)
        module.weight = None
        memory *= 2  # behind PyTorch's back, as if freed and filled again
        module.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
        assert (module.weight.data_ptr(), module.weight._version) == state
        assert torch.equal(module(context), 2 * before)


def test_cached_bytes_are_capped(host: Any, delta: ConceptDelta) -> None:
    """The least recently used batch goes first; a cap smaller than one batch keeps nothing and stays right."""
    x, t, first = batch(host, ["a star"])
    contexts = [first, *(batch(host, [p])[2] for p in ("cat", "dog"))]
    composition = Composition((delta,))
    stock = []
    for context in contexts:
        with KVProjector(host.attention_layers(), composition, keep=False).attached():
            stock.append(host.predict(x, t, context))
    probe = KVProjector(host.attention_layers(), composition)
    with probe.attached():
        host.predict(x, t, first)
        one = probe.cached_bytes
        assert one > sum(10 * m.weight.shape[0] * 4 for m in projections(host.attention_layers()).values())
    assert probe.cached_bytes == 0

    two = KVProjector(host.attention_layers(), composition, max_bytes=2 * one)
    with counted(host) as calls, two.attached():
        for index, expected_calls in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):  # 2 pushes out 1, not 0
            assert torch.equal(host.predict(x, t, contexts[index].clone()), stock[index])
            assert set(calls.values()) == {expected_calls}
            assert two.cached_bytes <= 2 * one
    for cap in (0, one // 2):
        small = KVProjector(host.attention_layers(), composition, max_bytes=cap)
        with small.attached():
            for round_ in range(20):
                index = round_ % 3
                assert torch.equal(host.predict(x, t, contexts[index] * 1.0), stock[index])
                host.predict(x, t, torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(round_)))
            assert small.cached_bytes < one  # does not grow with the number of prompts


# --- hosts that leave the patch in place


def in_place(host: Any, projector: KVProjector) -> Any:
    return patched(projections(host.attention_layers()), projector.wrap)


def test_between_forward_passes_the_patch_does_nothing(host: Any, delta: ConceptDelta) -> None:
    x, t, context = batch(host, ["a star", "cat"])
    stock = host.predict(x, t, context)
    projector = KVProjector(host.attention_layers(), Composition((delta,)))
    with counted(host) as calls, in_place(host, projector):
        with projector.forward_pass(torch.ones(1)):
            erased = host.predict(x, t, context)
        assert torch.equal(host.predict(x, t, context), stock)
        with pytest.raises(ZeroDivisionError), projector.forward_pass(torch.ones(1)):
            1 / 0  # noqa: B018
        assert torch.equal(host.predict(x, t, context), stock)
        calls.clear()
        with projector.forward_pass(torch.ones(1)):
            assert torch.equal(host.predict(x, t, context.clone()), erased)
        assert calls == {}  # cached by the first pass
        with projector.forward_pass(torch.ones(1)):
            with projector.forward_pass(torch.zeros(1)):
                assert torch.equal(host.predict(x, t, context), stock)
            assert torch.equal(host.predict(x, t, context), erased)  # the pass inside is over, this one is not
    assert not torch.equal(erased, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rows_that_another_extension_added(host: Any, delta: ConceptDelta, mode: Any) -> None:
    """Each gets the strengths of the prompt with the same tokens; one that is no prompt of the batch gets the default, and is reported."""
    with mode():
        _, _, context = batch(host, ["a star", "a star big", "cat"])
        module = projections(host.attention_layers())["middle_block.1.transformer_blocks.0.attn2.to_v"]
        table, unknown = torch.tensor([[1.0], [0.0], [0.5]]), []
        projector = KVProjector(host.attention_layers(), Composition((delta,)), gate=False)

        def project(c: Tensor, *strengths: float) -> None:
            fresh = KVProjector(host.attention_layers(), Composition((delta,)), gate=False, keep=False)
            with fresh.attached(torch.tensor(strengths)[:, None]):
                expected = module(c)
            default = torch.tensor([0.25])
            with in_place(host, projector), projector.forward_pass(table, context, default, lambda: unknown.append(len(c))):
                assert torch.equal(module(c), expected)
                assert torch.equal(module(c.clone()), expected)

        project(context[[2, 0, 1, 0]], 0.5, 1.0, 0.0, 1.0)
        project(context[[1, 2]].repeat(1, 2, 1), 0.0, 0.5)  # tokens repeated to another row's length
        assert unknown == []
        project(torch.cat([context, context[:1].flip(1)]), 1.0, 0.0, 0.5, 0.25)
        assert unknown
        project(context * 1.5, 1.0, 0.0, 0.5)  # as many rows as the batch: by their place


def test_a_pass_does_not_fill_the_memory(host: Any, delta: ConceptDelta) -> None:
    """An extension that makes a new context a layer."""
    _, _, context = batch(host, ["a star"])
    module = projections(host.attention_layers())["middle_block.1.transformer_blocks.0.attn2.to_v"]
    projector = KVProjector(host.attention_layers(), Composition((delta,)), max_bytes=0)
    with in_place(host, projector), projector.forward_pass(torch.ones(1), context) as current:
        for i in range(50):
            module(context + i)
        assert 0 < len(current._seen) <= MAX_SEEN


def test_a_pass_cannot_be_changed(host: Any, delta: ConceptDelta) -> None:
    projector = KVProjector(host.attention_layers(), Composition((delta,)))
    with projector.forward_pass(torch.ones(1), state="first") as current:
        for name in ("strengths", "prompts", "default", "on_unknown", "state"):
            with pytest.raises(FrozenInstanceError):
                setattr(current, name, None)


# --- the model is left as it was found


def test_the_model_is_left_as_found(host: Any, delta: ConceptDelta) -> None:
    before, weights = forwards(host), {n: p.clone() for n, p in host.unet.named_parameters()}
    x, t, context = batch(host, ["a star"])
    projector = KVProjector(host.attention_layers(), Composition((delta,)))
    with projector.attached():
        host.predict(x, t, context)
        assert all("forward" in m.__dict__ for m in projections(host.attention_layers()).values())
        with KVProjector(host.attention_layers(), Composition((delta,))).attached(torch.zeros(1)):
            host.predict(x, t, context)
    assert forwards(host) == before
    with pytest.raises(ZeroDivisionError), projector.attached():
        1 / 0  # noqa: B018
    assert forwards(host) == before
    with pytest.raises(RuntimeError), projector.attached():
        host.predict(x[:, :2], t, context)
    assert forwards(host) == before
    with pytest.raises(SepMEError, match="do not fit"), projector.attached(torch.ones(3, 1)):
        host.predict(x, t, context)
    assert forwards(host) == before
    assert all(torch.equal(p, weights[n]) for n, p in host.unet.named_parameters())


def test_a_tensor_that_another_extension_keeps_is_not_written_to(host: Any, delta: ConceptDelta) -> None:
    """A host's plain linear makes its output anew, and the delta is added in place; whatever else stands there may hold on to it."""
    projector = KVProjector(host.attention_layers(), Composition((delta,)), gate=False)
    name, module = next(iter(projector.modules.items()))
    context = host.encode(["a star", ""]).context
    with torch.no_grad():
        stock = module(context)
        held = stock.clone()
        theirs = projector.wrap(name, module, lambda _: held)
        plain = projector.wrap(name, module, module.forward)
        with projector.forward_pass(torch.ones(1)):
            first = theirs(context)
        with projector.forward_pass(torch.ones(1)):
            second = plain(context)
    assert torch.equal(held, stock)
    assert torch.equal(first, second)
    assert not torch.equal(first, stock)


def test_a_forward_that_was_there_is_put_back(host: Any, delta: ConceptDelta) -> None:
    """Another extension's instance forward (identity and place in __dict__), also when wrapping fails half way."""
    modules = projections(host.attention_layers())
    with counted(host) as calls:
        found = {n: m.__dict__["forward"] for n, m in modules.items()}
        before = forwards(host)
        with KVProjector(host.attention_layers(), Composition((delta,))).attached():
            assert all(m.__dict__["forward"] is not found[n] for n, m in modules.items())
            host.encode(["a star"])
        assert forwards(host) == before

        def failing(name: str, module: nn.Module, forward: Any) -> Any:
            if name.startswith("middle_block"):
                raise KeyError(name)
            return forward

        with pytest.raises(KeyError), patched(modules, failing):
            pass
        assert forwards(host) == before
        assert calls == {}
    with pytest.raises(KeyError), patched(modules, failing):
        pass
    assert not any("forward" in m.__dict__ for m in modules.values())


def test_strengths_are_one_unless_given(host: Any, delta: ConceptDelta) -> None:
    """Also after an earlier use of the same projector with others."""
    x, t, context = batch(host, ["a star"])
    projector = KVProjector(host.attention_layers(), Composition((delta,)))
    stock = host.predict(x, t, context)
    with projector.attached():
        erased = host.predict(x, t, context)
    with projector.attached(torch.zeros(1)):
        assert torch.equal(host.predict(x, t, context), stock)
    with projector.attached():
        assert torch.equal(host.predict(x, t, context), erased)
    assert not torch.equal(erased, stock)


def test_an_empty_composition_changes_nothing(host: Any) -> None:
    x, t, context = batch(host, ["a star"])
    stock = host.predict(x, t, context)
    with KVProjector(host.attention_layers(), Composition(())).attached():
        assert torch.equal(host.predict(x, t, context), stock)


def test_deltas_of_another_model_are_refused(host: Any, make_random_delta: Callable[..., ConceptDelta]) -> None:
    foreign = make_random_delta("star", {"middle_block.1.transformer_blocks.0.attn2.to_k": (8, 64)})
    with pytest.raises(SepMEError, match=r"but the model is unet-64x5-\w+; train the concept on this model"):
        KVProjector(host.attention_layers(), Composition((foreign,)))
