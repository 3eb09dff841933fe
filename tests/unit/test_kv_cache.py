"""Keys and values cached across steps: one comparison per forward pass, and everything that must make them be computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepme.apply.composition import Composition, Touch
from sepme.apply.kv_cache import MAX_BATCHES, CachedBatch, KVCache
from sepme.apply.ops import project_kv
from sepme.apply.projector import KVProjector
from sepme.delta.concept_delta import ConceptDelta
from sepme.model.layers import projections
from sepme.model.patch import patched


def cached(again: Tensor, first: Tensor) -> bool:
    """Whether keys or values are those of before: in the same memory. Asking ``data_ptr`` would copy it."""
    return torch._C._data_address(again) == torch._C._data_address(first)


@pytest.fixture
def delta(host: Any, shapes_of: Callable[..., Any], make_random_delta: Callable[..., ConceptDelta]) -> ConceptDelta:
    return make_random_delta("star", shapes_of(host), rank=4, seed=1, size=0.5)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def counting(calls: list[str]) -> Callable[..., Any]:
    """A wrapper for :func:`patched` that notes whose own projection ran."""

    def wrap(name: str, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda context: calls.append(name) or forward(context)  # type: ignore[func-returns-value]

    return wrap


# --- one comparison per forward pass


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["exact", "fused"])
def test_one_comparison_a_forward_pass(host: Any, delta: ConceptDelta, mode: Any, backend: str) -> None:
    """Hosts make a new context every step, or give the same tensor; inference tensors have no version counter."""
    with mode():
        x, t, context = host.latents([0, 1]), torch.tensor([5, 5]), host.encode(["a star", "cat"]).context
        projector = KVProjector(host.attention_layers(), Composition((delta,)), backend=backend)
        with projector.attached():
            for step in range(5):
                host.predict(x, t, context if step % 2 else context.clone())
                assert projector.cache.comparisons == step + 1
            assert len(projector.cache) == 1


def test_keys_and_values_of_different_contexts(host: Any, delta: ConceptDelta) -> None:
    """NegPip gives to_k the even and to_v the odd tokens, sliced anew in every layer: two contexts a pass, two comparisons."""
    modules = projections(host.attention_layers())
    both = host.encode(["a star", "cat"]).context.repeat_interleave(2, dim=1)
    both[:, 1::2] *= -1

    def sliced(step: Tensor) -> dict[str, Tensor]:
        return {name: module(step[:, 0::2] if name.endswith("to_k") else step[:, 1::2]) for name, module in modules.items()}

    with KVProjector(host.attention_layers(), Composition((delta,)), keep=False).attached():
        expected = sliced(both)
    projector, calls = KVProjector(host.attention_layers(), Composition((delta,))), []
    with patched(modules, counting(calls)), projector.attached():
        for step in range(3):
            assert all(torch.equal(out, expected[name]) for name, out in sliced(both.clone()).items())
            assert projector.cache.comparisons == 2 * (step + 1)
    assert sorted(calls) == sorted(modules)


def test_batches_that_take_turns_are_compared_at_once(host: Any, delta: ConceptDelta) -> None:
    """Positive and negative prompts in passes of their own, as hosts do when memory is short; prompt editing likewise."""
    x, t = host.latents([0]), torch.tensor([5])
    contexts = [host.encode([p]).context for p in ("a star", "", "cat")]
    projector, calls = KVProjector(host.attention_layers(), Composition((delta,))), []
    with patched(projections(host.attention_layers()), counting(calls)), projector.attached():
        for _ in range(4):
            for context in contexts:
                host.predict(x, t, context.clone())
        assert projector.cache.comparisons == 12
    assert len(calls) == 3 * len(projections(host.attention_layers()))


def test_a_context_written_over_between_passes_is_noticed(host: Any, delta: ConceptDelta) -> None:
    """In inference mode too, where nothing but the content tells."""
    with torch.inference_mode():
        x, t, context = host.latents([0]), torch.tensor([5]), host.encode(["a star"]).context.clone()
        other = host.encode(["cat"]).context
        with KVProjector(host.attention_layers(), Composition((delta,)), keep=False).attached():
            expected = host.predict(x, t, other)
        with KVProjector(host.attention_layers(), Composition((delta,))).attached():
            assert not torch.equal(host.predict(x, t, context), expected)
            context.copy_(other)
            assert torch.equal(host.predict(x, t, context), expected)


# --- what makes them be computed again


def test_state_of_the_host(make_host: Callable[..., Any], delta: ConceptDelta) -> None:
    """A weight written past the version counter does not show; a host that does so says it in the pass's ``state``."""
    host = make_host()
    module = projections(host.attention_layers())["middle_block.1.transformer_blocks.0.attn2.to_v"]
    context = host.encode(["a star"]).context
    projector = KVProjector(host.attention_layers(), Composition((delta,)))

    def project(state: str) -> Tensor:
        with projector.forward_pass(torch.ones(1), state=state):
            return module(context)

    with projector.attached():
        first = project("before")
        module.weight.data.mul_(2)
        assert cached(project("before"), first)  # does not show
        assert not torch.equal(project("after"), first)
        module.weight.data.div_(2)
        assert cached(project("before"), first)


def test_autocast_is_part_of_the_key(host: Any, delta: ConceptDelta) -> None:
    context = host.encode(["a star"]).context
    module = projections(host.attention_layers())["middle_block.1.transformer_blocks.0.attn2.to_v"]
    found = {}
    for keep in (False, True):
        with KVProjector(host.attention_layers(), Composition((delta,)), keep=keep, backend="fused").attached():
            plain = module(context)
            with torch.autocast("cpu", torch.bfloat16):
                half = module(context)
            again = module(context)
        assert (plain.dtype, half.dtype, again.dtype) == (torch.float32, torch.bfloat16, torch.float32)
        assert torch.equal(plain, again)
        found[keep] = plain, half
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_autocast_leaves_gate_and_delta_in_float32(host: Any, delta: ConceptDelta) -> None:
    """Automatic1111 runs under autocast: what is rounded there is the host's own product, nothing of ours."""
    composition, context = Composition((delta,)), host.encode(["a star", "cat"]).context
    plain = composition.touch(context, torch.ones(1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = composition.touch(context, torch.ones(1))
    assert torch.equal(plain.h, cast.h)
    assert torch.equal(plain.rows, cast.rows)


def test_peft_adapters(make_host: Callable[..., Any], delta: ConceptDelta) -> None:
    """Loaded, weighed, switched off and on, merged, trained on, all while attached: always what a fresh projector gives."""
    peft = pytest.importorskip("peft")
    host = make_host()
    host.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "one")
    host.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "two")
    layers = host.attention_layers()
    context = host.encode(["a star"]).context
    name = "middle_block.1.transformer_blocks.0.attn2.to_v"
    module = projections(layers)[name]
    assert hasattr(module, "base_layer")
    composition = Composition((delta,))
    changes: list[Callable[[], Any]] = [
        lambda: host.unet.set_adapters(["one"]),
        lambda: host.unet.set_adapters(["one"], weights=[0.5]),
        lambda: host.unet.set_adapters(["one", "two"]),
        lambda: host.unet.disable_adapters(),
        lambda: host.unet.enable_adapters(),
        lambda: module.lora_A["one"].weight.mul_(2),
        lambda: module.lora_B["two"].weight.add_(1),
        lambda: module.base_layer.weight.mul_(0.5),
        lambda: module.merge(),
    ]
    for backend in ("exact", "fused"):
        with KVProjector(layers, composition, backend=backend).attached():
            last = module(context)
            for i, change in enumerate(changes):
                change()
                now, again = module(context), module(context)
                assert cached(again, now)
                patch = module.__dict__.pop("forward")
                with KVProjector(layers, composition, keep=False, backend="exact").attached():
                    assert torch.equal(module(context), now), i
                module.forward = patch
                if i < len(changes) - 1:  # merging moves the adapter into the weight, which changes hardly anything
                    assert not torch.equal(now, last), i
                last = now
        module.unmerge()


def test_offloaded_weights_are_cached_too(make_host: Callable[..., Any], delta: ConceptDelta) -> None:
    """accelerate puts new parameters in before every forward and takes them out after it."""
    accelerate = pytest.importorskip("accelerate")
    host = make_host()
    x, t, context = host.latents([0]), torch.tensor([5]), host.encode(["a star"]).context
    composition = Composition((delta,))
    with KVProjector(host.attention_layers(), composition, keep=False).attached():
        expected = host.predict(x, t, context)
    accelerate.cpu_offload(host.unet, execution_device=torch.device("cpu"))
    modules = projections(host.attention_layers())
    assert all(m.weight.device.type == "meta" for m in modules.values())
    for backend in ("exact", "fused"):
        calls: list[str] = []
        with patched(modules, counting(calls)), KVProjector(host.attention_layers(), composition, backend=backend).attached():
            for _ in range(4):
                assert torch.equal(host.predict(x, t, context), expected)
        assert sorted(calls) == sorted(modules)


def test_a_tensor_that_others_keep_is_not_written_to(host: Any, delta: ConceptDelta, make_random_delta: Any, shapes_of: Any) -> None:
    """Another pack (here: a second projector inside) may keep what it returned."""
    other = make_random_delta("moon", shapes_of(host), rank=2, seed=2)
    context = host.encode(["a star"]).context
    modules = projections(host.attention_layers())
    inner = KVProjector(host.attention_layers(), Composition((other,)))
    with inner.attached():
        alone = {n: m(context) for n, m in modules.items()}
        copies = {n: out.clone() for n, out in alone.items()}
        for keep in (True, False):
            with KVProjector(host.attention_layers(), Composition((delta,)), keep=keep).attached():
                both = {n: m(context) for n, m in modules.items()}
                again = {n: m(context.clone()) for n, m in modules.items()}
            for name in modules:
                assert torch.equal(both[name], again[name])
                assert not torch.equal(both[name], copies[name])
        assert all(torch.equal(alone[n], copies[n]) and torch.equal(m(context), copies[n]) for n, m in modules.items())


# --- limits, and the end of a run


def test_an_interrupt_lets_go_of_everything(host: Any, delta: ConceptDelta, monkeypatch: pytest.MonkeyPatch) -> None:
    projectors: list[KVProjector] = []
    monkeypatch.setattr("sepme.hosts.diffusers.KVProjector", lambda *a, **k: projectors.append(KVProjector(*a, **k)) or projectors[-1])
    held: list[int] = []

    def stop(step: int) -> None:
        held.append(projectors[0].cached_bytes)
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.generate(["a star"], [1], Composition((delta,)), steps=5, on_step=stop)
    assert held[0] > 0
    assert projectors[0].cached_bytes == 0
    assert not any("forward" in m.__dict__ for m in projections(host.attention_layers()).values())


def test_bytes_are_those_of_the_tensors(host: Any, delta: ConceptDelta) -> None:
    """Context, H and every projection's output; as many whether fused or not."""
    context = host.encode(["a star", "cat"]).context
    modules = projections(host.attention_layers())
    for backend in ("exact", "fused"):
        projector = KVProjector(host.attention_layers(), Composition((delta,)), backend=backend)
        with projector.attached():
            outputs = [m(context) for m in modules.values()]
            h = 2 * context.shape[1] * 4
            assert projector.cached_bytes == 4 * (context.numel() + h + sum(out.numel() for out in outputs))
        assert projector.cached_bytes == 0


UNTOUCHED = Touch(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 0), ())


def test_few_batches_are_held() -> None:
    """The least recently used go first; what is found again counts as used when it is put back."""
    cache, contexts = KVCache(1 << 30), [torch.full((1, 2, 3), float(i)) for i in range(3 * MAX_BATCHES)]
    for context in contexts:
        cache.put(CachedBatch(context, torch.ones(1), None, UNTOUCHED))
        first = cache.get(contexts[0], torch.ones(1), None)
        assert first is not None
        cache.put(first)
    assert len(cache) == MAX_BATCHES
    assert cache.get(contexts[1], torch.ones(1), None) is None
    assert cache.get(contexts[-1], torch.ones(1), None) is not None
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_a_batch_was_made_of_may_be_written_over() -> None:
    cache, context, strengths = KVCache(1 << 30), torch.zeros(1, 2, 3), torch.ones(1)
    cache.put(CachedBatch(context, strengths, None, UNTOUCHED))
    context.add_(1)
    strengths.add_(1)
    assert cache.get(context, strengths, None) is None
    assert cache.get(context - 1, strengths - 1, None) is not None


def test_type_device_strengths_and_state_tell_batches_apart() -> None:
    cache, given, context = KVCache(1 << 30), torch.ones(1), torch.zeros(1, 2, 3)
    variants: list[tuple[Tensor, Tensor, Any]] = [
        (context, given, None),
        (context.half(), given, None),
        (context.to("meta"), given, None),
        (context.reshape(2, 1, 3), given, None),
        (context, torch.zeros(1), None),
        (context, torch.ones(1, 1), None),
        (context, given, "patched"),
    ]
    made = []
    for variant in variants:
        assert cache.get(*variant) is None
        made.append(CachedBatch(*variant, UNTOUCHED))
        cache.put(made[-1])
    for variant, batch in zip(variants, made, strict=True):
        if not variant[0].is_meta:  # nothing to compare in a meta tensor; that it was told apart from the others is what counts
            assert cache.get(*variant) is batch


# --- extensions that write into what they are given


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["exact", "fused"])
@pytest.mark.parametrize("way", ["in place", "data"])
def test_an_extension_that_writes_into_keys_and_values(
    host: Any, delta: ConceptDelta, mode: Any, backend: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some turn values round in every step, some past the version counter: what they write into is theirs, and nothing is made anew."""
    modules, calls = projections(host.attention_layers()), []
    monkeypatch.setattr("sepme.apply.projector.project_kv", lambda *args: calls.append("all") or project_kv(*args))
    with mode():
        context = host.encode(["a star", "cat"]).context
        with KVProjector(host.attention_layers(), Composition((delta,)), keep=False, backend=backend).attached():
            expected = {name: module(context).clone() for name, module in modules.items()}
        calls.clear()
        projector, after_step = KVProjector(host.attention_layers(), Composition((delta,)), backend=backend), []
        forwards = {} if backend == "fused" else modules  # fused takes a host's own plain products only
        with patched(forwards, counting(calls)), projector.attached():
            for step in range(5):
                for name, module in modules.items():
                    output = module(context)
                    assert torch.equal(output, expected[name]), step
                    if name.endswith("to_v"):
                        part = output[:, 1:]
                        (part.data if way == "data" else part).neg_()
                after_step.append(len(calls))
            assert after_step == [1 if backend == "fused" else len(modules)] * 5
            held = projector.cached_bytes
            projector.clear()
            for module in modules.values():
                module(context)
            assert projector.cached_bytes == held


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_copied_while_nobody_writes(host: Any, delta: ConceptDelta, mode: Any) -> None:
    modules = projections(host.attention_layers())
    with mode(), KVProjector(host.attention_layers(), Composition((delta,))).attached():
        context = host.encode(["a star"]).context
        first = [m(context) for m in modules.values()]
        assert all(cached(m(context), out) for m, out in zip(modules.values(), first, strict=True))
