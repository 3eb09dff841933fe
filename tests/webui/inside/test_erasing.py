"""What reaches the UNet: tags, rows, passes, exactness. Both hosts."""

from __future__ import annotations

import itertools
from typing import Any

import modules.infotext_utils
import modules.processing
import modules.shared
import modules.toy
import pytest
import torch


def hooks(ui: Any) -> list[str]:
    """Forwards that are live on the model and are the extension's."""
    Hook = ui.part("scripts.webui.host").Hook
    owner = ui.model.forge_objects.unet.model if ui.kind == "forge" else ui.model.model
    return [name for name, module in owner.named_modules() if isinstance(module.__dict__.get("forward"), Hook)]


def test_off_nothing_is_touched(webui: Any) -> None:
    stock = webui.draw(script=False)
    assert torch.equal(webui.draw(), stock)
    assert hooks(webui) == []
    assert "SepME concepts" not in webui.infotexts[0]


def test_erased_preserved_and_restored(webui: Any) -> None:
    stock = webui.draw(script=False)
    erased = webui.erase("star")
    assert not torch.equal(erased, stock)
    assert torch.equal(webui.erase("star", strengths='{"star": 0}'), stock)
    assert torch.equal(webui.draw("a star <keep:star>", True, ["star"]), stock)
    assert torch.equal(webui.draw(), stock)
    partial = webui.erase("star", strengths='{"star": 0.5}')
    assert not torch.equal(partial, erased)
    assert not torch.equal(partial, stock)


def test_other_prompts_are_bit_identical(webui: Any) -> None:
    stock = webui.draw("a red house", script=False)
    assert torch.equal(webui.erase("star", "heart", "moon", prompt="a red house"), stock)


def test_gate_off_is_linear(webui: Any) -> None:
    assert not torch.equal(webui.erase("star", prompt="a red house", gate=False), webui.draw("a red house", script=False))


def test_tags_work_without_the_panel(webui: Any) -> None:
    assert torch.equal(webui.draw("a <erase:star> star"), webui.erase("star"))
    assert torch.equal(webui.draw("a star <erase:Star:0.5>"), webui.erase("star", strengths='{"star": 0.5}'))


def test_tags_never_reach_the_text_encoder(webui: Any) -> None:
    webui.model.texts.clear()
    webui.draw("a star <erase:star>, <lora:x:1>", negative_prompt="ugly <keep:star>", enable_hr=True, hr_negative_prompt="bad <erase:moon>")
    assert webui.model.texts
    assert not [t for t in webui.model.texts if "<" in t or "erase" in t or "keep" in t]


def test_each_prompt_of_a_batch_has_its_own(webui: Any) -> None:
    prompts = ["a star", "a star <erase:star>", "a star <erase:star:0.5>", "a heart <erase:heart>"]
    together = webui.draw(prompts, batch_size=4)
    for i, prompt in enumerate(prompts):
        assert torch.allclose(together[i], webui.draw(prompt, seed=i)[0], atol=1e-5)
    assert torch.equal(together[0], webui.draw([p.split(" <")[0] for p in prompts], batch_size=4, script=False)[0])


def test_batches_of_a_prompt_matrix(webui: Any) -> None:
    prompts = ["a star", "a star <erase:star>", "a star <keep:star>", "a moon"]
    in_two = webui.draw(prompts, True, ["star"], "", True, "auto", batch_size=2)
    for i, prompt in enumerate(prompts):
        assert torch.allclose(in_two[i], webui.draw(prompt, True, ["star"], seed=i)[0], atol=1e-5)


def test_negative_prompts_have_their_own(webui: Any) -> None:
    stock = webui.draw("a house", negative_prompt="a star", script=False)
    erased = webui.draw("a house", negative_prompt="a star <erase:star>")
    assert not torch.equal(erased, stock)
    assert torch.equal(webui.draw("a house", True, ["star"], negative_prompt="a star <keep:star>"), stock)
    assert torch.equal(webui.draw("a house", True, ["star"], negative_prompt="a star"), erased)


def test_same_words_erased_in_one_and_preserved_in_the_other(webui: Any) -> None:
    """Prompt and negative prompt have the same tokens; only their order tells them apart."""
    stock = webui.draw("a star", negative_prompt="a star", script=False)
    first = webui.draw("a star <erase:star>", negative_prompt="a star")
    second = webui.draw("a star", negative_prompt="a star <erase:star>")
    assert not torch.equal(first, stock)
    assert not torch.equal(second, stock)
    assert not torch.equal(first, second)


def test_AND_and_prompt_editing(webui: Any) -> None:
    for prompt in ("a star AND a moon", "[a star:a house:2]", "a [heart:star:1] AND a house"):
        stock = webui.draw(prompt, script=False)
        assert torch.equal(webui.draw(f"{prompt} <keep:star>", True, ["star"]), stock)
        erased = webui.draw(f"{prompt} <erase:star>")
        assert not torch.equal(erased, stock)
        assert torch.allclose(erased, webui.erase("star", prompt=prompt), atol=1e-5)
    two = webui.draw(["a star AND a moon <erase:star>", "a star AND a house"], batch_size=2)
    assert torch.allclose(two[0], webui.draw("a star AND a moon <erase:star>")[0], atol=1e-5)
    assert torch.allclose(two[1], webui.draw("a star AND a house", seed=1, script=False)[0], atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_prompts_of_other_lengths_than_negative_ones(webui: Any, together: bool) -> None:
    """Prompts of two chunks and negative prompts of one: several calls in Automatic1111, longer contexts in Forge."""
    modules.shared.opts.batch_cond_uncond = together
    long = "a star " + "very " * 90
    prompts, negatives = [long, f"{long} <erase:star>"], ["a star", "a star <keep:star>"]
    latents = webui.draw(prompts, True, ["star"], '{"star": 0.5}', True, "auto", negative_prompt=negatives, batch_size=2)
    for i in range(2):
        alone = webui.draw(prompts[i], True, ["star"], '{"star": 0.5}', True, "auto", negative_prompt=negatives[i], seed=i)
        assert torch.allclose(latents[i], alone[0], atol=1e-5)
    assert not webui.last.comments


def test_calls_one_by_one(webui: Any) -> None:
    modules.shared.opts.batch_cond_uncond = False
    prompts = ["a star", "a star <erase:star>"]
    latents = webui.draw(prompts, batch_size=2, negative_prompt=["a star <erase:star>", "a star"])
    stock = webui.draw(["a star", "a star"], batch_size=2, negative_prompt="a star", script=False)
    assert not torch.equal(latents[0], stock[0])
    assert not torch.equal(latents[1], stock[1])
    assert not torch.equal(latents[0] - stock[0], latents[1] - stock[1])


def test_hires_pass_has_its_own_prompts(webui: Any) -> None:
    stock = webui.draw("a star", enable_hr=True, script=False)
    both = webui.draw("a star <erase:star>", enable_hr=True)
    second = webui.draw("a star", enable_hr=True, hr_prompt="a star <erase:star>")
    assert torch.equal(webui.draw("a star", True, ["star"], '{"star": 0}', enable_hr=True), stock)
    assert len({tuple(x.flatten().tolist()) for x in (stock, both, second)}) == 3
    assert hooks(webui) == [] or webui.kind == "forge"


@pytest.mark.parametrize(
    "more", [{}, {"enable_hr": True}, {"enable_hr": True, "hr_prompt": "a moon"}, {"init_images": [torch.zeros(1, 4, 8, 8)]}]
)
def test_every_tab_and_pass_is_recorded(webui: Any, more: Any) -> None:
    """The hires prompts are None without hires, and in img2img no attributes at all."""
    webui.draw("a star <erase:moon>", True, ["star"], **more)
    assert not webui.last.comments
    params = modules.infotext_utils.parse_generation_parameters(webui.infotexts[0])
    assert params["SepME concepts"].startswith("star (")
    assert params["SepME tags"].startswith("moon (")


def test_img2img_and_inpainting(webui: Any) -> None:
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    for more in ({"init_images": [start]}, {"init_images": [start], "mask": mask}):
        stock = webui.draw(script=False, **more)
        assert not torch.equal(webui.erase("star", **more), stock)
        assert torch.equal(webui.draw("a star <keep:star>", True, ["star"], **more), stock)


def test_prompts_of_another_extension(webui: Any) -> None:
    """A tag that comes in after ours were read counts for the whole batch."""
    networks, late = webui.part("scripts.webui.networks"), []

    class Late:
        name = "late"

        def activate(self, p: Any, params_list: Any) -> None:
            late.append(p)

    import modules.extra_networks

    data = {"erase": [modules.extra_networks.ExtraNetworkParams(items=["star", "0.5"])]}
    original = modules.processing.extra_networks.activate
    modules.processing.extra_networks.activate = lambda p, found: original(p, data)
    try:
        sampled = webui.draw("a star")
    finally:
        modules.processing.extra_networks.activate = original
    assert torch.equal(sampled, webui.draw("a star <erase:star:0.5>"))
    assert networks.TagNetwork("erase").deactivate(None) is None


def test_unpatching_leaves_nothing(webui: Any) -> None:
    before = {k: v.clone() for k, v in webui.model.unet.state_dict().items()}
    webui.erase("star", "moon")
    webui.draw(script=False)  # Forge takes patches off when it loads the next
    assert hooks(webui) == []
    after = webui.model.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert webui.part("scripts.webui.generation")._runs == []


def test_an_error_in_the_middle_leaves_other_runs_alone(webui: Any) -> None:
    stock = webui.draw(script=False)

    def stop(p: Any, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        webui.erase("star", on_step=stop)
    assert torch.equal(webui.draw(script=False), stock)
    assert torch.equal(webui.draw(), stock)


def test_checkpoint_changed_between_runs(webui: Any) -> None:
    webui.erase("star")
    modules.shared.sd_model = modules.toy.Checkpoint(seed=1)
    stock = webui.draw(script=False)
    assert not torch.equal(webui.erase("star"), stock)
    assert torch.equal(webui.draw(), stock)


def test_a_refiner_takes_over_in_the_middle(webui: Any) -> None:
    other = modules.toy.Checkpoint(seed=1)
    first = modules.shared.sd_model

    def switch(p: Any, step: int) -> None:
        if step == 1:
            modules.shared.sd_model = other
            if webui.kind == "forge":
                modules.processing.sampling_prepare(other.forge_objects.unet, None)

    def sampled(*args: Any, script: bool = True) -> torch.Tensor:
        modules.shared.sd_model = first
        modules.toy.UnetPatcher.loaded = None
        return webui.draw("a star", *args, script=script, on_step=switch)

    stock, erased = sampled(script=False), sampled(True, ["star"])
    assert torch.equal(sampled(True, ["star"], '{"star": 0}'), stock)
    assert not torch.equal(erased, stock)

    def before_only(p: Any, step: int) -> None:
        switch(p, step)
        if step == 1:
            webui.part("scripts.webui.generation").release()

    modules.shared.sd_model = first
    modules.toy.UnetPatcher.loaded = None
    assert not torch.equal(webui.draw("a star", True, ["star"], on_step=before_only), erased)


def test_weights_that_change_in_the_middle(webui: Any) -> None:
    """Automatic1111 applies LoRAs inside ``forward``, when the layer is used next; cached keys and values must notice."""
    layer = webui.model.unet.middle_block[1].transformer_blocks[0].attn2.to_v
    weight = layer.weight.detach().clone()

    def add(p: Any, step: int) -> None:
        with torch.no_grad():
            layer.weight.copy_(weight + (0.1 if step == 2 else 0))

    try:
        stock, plain = webui.draw(script=False, on_step=add), webui.draw(script=False)
        assert not torch.equal(stock, plain)
        assert torch.equal(webui.draw("a star <keep:star>", True, ["star"], on_step=add), stock)
        preserved = webui.draw("a house", True, ["star"], on_step=add)
        with torch.no_grad():
            layer.weight.copy_(weight)
        assert torch.equal(preserved, webui.draw("a house", script=False, on_step=add))
    finally:
        with torch.no_grad():
            layer.weight.copy_(weight)


def test_forward_of_another_extension_stays_in_use(webui: Any) -> None:
    """ControlNet and NegPip put forwards of their own on modules; ours calls theirs, and leaves them where they were."""
    layer = webui.model.unet.middle_block[1].transformer_blocks[0].attn2.to_v
    calls = []
    own = type(layer).forward

    def theirs(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return own(layer, x) * 1.5

    layer.forward = theirs
    try:
        stock = webui.draw("a house", script=False)
        calls.clear()
        assert torch.equal(webui.erase("star", prompt="a house"), stock)
        assert calls
        if webui.kind == "a1111":
            assert layer.__dict__["forward"] is theirs
    finally:
        webui.model.unet  # noqa: B018
        del layer.forward


def test_rows_that_another_extension_splits(webui: Any) -> None:
    """NegPip calls projections for one half of the batch after the other, with tokens of its own behind the prompt's, whose values it
    turns round in place."""
    attn2 = webui.model.unet.middle_block[1].transformer_blocks[0].attn2

    def half(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        context = torch.cat([context, context[:, -1:] * 0.5], dim=1)
        q, k, v = (t.unflatten(-1, (attn2.heads, -1)) for t in (attn2.to_q(x), attn2.to_k(context), attn2.to_v(context)))
        v[:, -1:] = -v[:, -1:]
        attended = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return x + attn2.to_out(attended.transpose(1, 2).flatten(2))

    def split(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return torch.cat([half(*part) for part in zip(x.chunk(2), context.chunk(2), strict=True)])

    attn2.forward = split
    try:
        more = {"negative_prompt": "a red house", "batch_size": 3}
        stock = webui.draw(["a star", "a star", "a house"], script=False, **more)
        sampled = webui.draw(["a star <keep:star>", "a star", "a house <erase:moon>"], True, ["star"], **more)
        assert torch.equal(sampled[[0, 2]], stock[[0, 2]])
        assert not torch.equal(sampled[1], stock[1])
        assert not webui.last.comments
    finally:
        del attn2.forward


@pytest.mark.parametrize("kind", ["a1111"])  # the Forges have a ControlNet of their own
@pytest.mark.parametrize("pooled", [0, 24])
def test_marks_that_controlnet_puts_before_prompts(webui: Any, pooled: int, tmp_path: Any) -> None:
    """Its forward takes them off again; the gate must not see them, nor may rows be taken for unknown ones."""
    modules.shared.sd_model = modules.toy.Checkpoint(seed=2, pooled=pooled)
    modules.paths.models_path = str(tmp_path)
    make_delta(webui)
    unet = webui.model.unet
    own = type(unet).forward

    def marked(p: Any) -> None:
        for cond, mark in ((p.c.batch, 1024), (p.uc, -1024)):
            for row in cond:
                schedules = row[0].schedules if isinstance(row, list) and hasattr(row[0], "schedules") else row
                for i, s in enumerate(schedules):
                    context = s.cond["crossattn"] if pooled else s.cond
                    context = torch.cat([torch.full_like(context[:1], mark), context])
                    schedules[i] = s._replace(cond={**s.cond, "crossattn": context} if pooled else context)

    def sampled(prompts: list[str], *args: Any, script: bool = True) -> torch.Tensor:
        def on_step(p: Any, step: int) -> None:
            if step == 0:
                marked(p)

        unet.forward = lambda x, t, context, **more: own(unet, x, t, context[:, 1:], **more)
        try:
            return webui.draw(prompts, *args, script=script, on_step=on_step, batch_size=len(prompts))
        finally:
            del unet.forward

    prompts = ["a star", "a red house"]
    stock = sampled(prompts, script=False)
    assert torch.equal(stock, webui.draw(prompts, script=False, batch_size=2))  # marked and unmarked
    erased = sampled(prompts, True, ["star"])
    assert torch.equal(erased, webui.erase("star", prompt=prompts, batch_size=2))
    assert torch.equal(erased[1], stock[1])
    mixed = sampled(["a star <erase:star>", "a star"])
    assert torch.equal(mixed[1], sampled(["a star", "a star"], script=False)[1])
    assert not torch.equal(mixed[0], stock[0])
    assert not webui.last.comments


def make_delta(webui: Any) -> Any:
    """A delta of the star for the model that is loaded, in the delta folder."""
    host, train = webui.part("scripts.webui.host"), webui.part("sepme.train")
    book = webui.part("sepme.concepts").ConceptBook.loads("concepts: [star, heart]")
    with host.loaded_model() as model:
        planner = webui.planner(model, book)
        delta = train.make_delta(planner, "star", model, train.TrainOptions.for_mode(objective="closed-form"))
    host.library.save(delta)
    return delta


def test_sdxl_pooled_vector(webui: Any, tmp_path: Any) -> None:
    modules.shared.sd_model = modules.toy.Checkpoint(seed=2, pooled=24)
    modules.paths.models_path = str(tmp_path)
    host, delta = webui.part("scripts.webui.host"), make_delta(webui)
    assert delta.pooled is not None
    stock = webui.draw(script=False)
    erased = webui.erase("star")
    assert not torch.equal(erased, stock)
    assert torch.equal(webui.erase("star", prompt="a red house"), webui.draw("a red house", script=False))
    unpooled = type(delta)(delta.concept, delta.down, delta.up, delta.scale, delta.gate, delta.info)
    next(iter((tmp_path / "sepme").glob("*.safetensors"))).unlink()
    host.library.save(unpooled)
    assert not torch.equal(webui.erase("star"), erased)


def test_backends_agree(webui: Any) -> None:
    sampled = [webui.draw("a star", True, ["star"], "", True, backend, negative_prompt="a star") for backend in ("exact", "fused", "eager")]
    for one, other in itertools.combinations(sampled, 2):
        assert torch.allclose(one, other, atol=1e-3)


def test_fused_says_once_why_it_is_something_else(webui: Any) -> None:
    def comments(*args: Any) -> list[str]:
        webui.draw("a star", True, ["star"], "", True, *args, n_iter=2)
        return [c for c in webui.last.comments if "fused" in c]

    assert comments("auto") == comments("exact") == []
    assert comments("fused") == ["SepME: backend fused: there is no kernel for cpu; plain PyTorch does the same here."]
    layer = webui.model.unet.middle_block[1].transformer_blocks[0].attn2.to_v
    own = type(layer).forward
    layer.forward = lambda x: own(layer, x)
    try:
        (said,) = comments("fused")
        assert "cast, patched or offloaded" in said
        assert "exact is used instead" in said
    finally:
        del layer.forward


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((True, ["nobody"]), "There is no delta 'nobody'"),
        ((True, ["star"], "{"), "not JSON"),
        ((True, ["star"], "", True, "cuda"), "no backend 'cuda'"),
        ((True, [1]), "list of concepts"),
    ],
)
def test_bad_settings_are_said_and_change_nothing(webui: Any, args: Any, sentence: str) -> None:
    assert torch.equal(webui.draw("a star", *args), webui.draw(script=False))
    webui.draw("a star", *args)
    assert [c for c in webui.last.comments if sentence in c and "nothing is erased" in c], webui.last.comments


def test_bad_tags_are_said_and_change_nothing(webui: Any) -> None:
    stock = webui.draw("a star", script=False)
    for tag, sentence in (("<erase:nobody>", "no delta of 'nobody'"), ("<erase:star:x>", "no number"), ("<keep:star:1>", "has a strength")):
        assert torch.equal(webui.draw(f"a star {tag}"), stock)
        assert any(sentence in c for c in webui.last.comments), webui.last.comments


def test_delta_of_another_model(webui: Any, make_webui: Any, tmp_path: Any) -> None:
    delta_module = webui.part("sepme.delta.concept_delta")
    path = next(iter(webui.folder.glob("star*.safetensors")))
    delta = delta_module.ConceptDelta.load(path)
    small = {k: v[:-2] for k, v in delta.up.items()}
    other = delta_module.ConceptDelta(delta.concept, delta.down, small, delta.scale, delta.gate, delta.info)
    ui = make_webui(webui.kind, tmp_path)
    ui.part("scripts.webui.host").library.save(
        ui.part("sepme.delta.concept_delta").ConceptDelta(other.concept, other.down, other.up, other.scale, other.gate, other.info)
    )
    assert torch.equal(ui.erase("star"), ui.draw(script=False))
    ui.erase("star")
    assert any("is for" in c and "train the concept on this model" in c for c in ui.last.comments), ui.last.comments


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Automatic1111's LoRA extension in small: ``nn.Linear.forward`` is its own, and changes a weight when the layer is next used."""
    import sys
    from types import ModuleType, SimpleNamespace

    from torch import nn

    module, plain = ModuleType("networks"), nn.Linear.forward
    module.loaded_networks = []  # type: ignore[attr-defined]

    def network_apply_weights(self: nn.Linear) -> None:
        wanted = tuple((n.name, n.unet_multiplier) for n in module.loaded_networks)
        if getattr(self, "network_current_names", ()) == wanted:
            return
        if not hasattr(self, "network_weights_backup"):
            self.network_weights_backup = self.weight.detach().clone()
        self.network_current_names = wanted
        scale = sum(n.unet_multiplier for n in module.loaded_networks)
        with torch.no_grad():
            self.weight.copy_(self.network_weights_backup * (1 + 0.2 * scale))

    def network_Linear_forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        network_apply_weights(self)
        return plain(self, x)

    network_Linear_forward.__module__ = "networks"
    module.network_apply_weights = network_apply_weights  # type: ignore[attr-defined]
    module.make = lambda m: SimpleNamespace(name="x", te_multiplier=m, unet_multiplier=m, dyn_dim=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "networks", module)
    monkeypatch.setattr(nn.Linear, "forward", network_Linear_forward)
    return module


@pytest.mark.parametrize("kind", ["a1111"])  # Forge's own are in real_forge.py
def test_loras_of_the_host(webui: Any, networks: Any) -> None:
    stock = webui.draw(script=False)
    erased = webui.erase("star")
    networks.loaded_networks = [networks.make(1.0)]
    with_lora = webui.draw(script=False)
    assert not torch.equal(with_lora, stock)
    assert torch.equal(webui.draw("a star <keep:star>", True, ["star"]), with_lora)
    assert torch.equal(webui.erase("star", prompt="a house"), webui.draw("a house", script=False))
    both = webui.erase("star")
    assert not torch.equal(both, with_lora)
    assert not torch.equal(both, erased)
    del networks.loaded_networks[0].dyn_dim  # Neo's have none
    assert torch.equal(webui.erase("star"), both)
    networks.loaded_networks = []
    assert torch.equal(webui.erase("star"), erased)
    assert torch.equal(webui.draw(script=False), stock)

    def weaken(p: Any, step: int) -> None:  # as extensions do that change a LoRA's weight between steps
        networks.loaded_networks = [networks.make(1.0 - 0.3 * step)]

    changing = webui.draw("a house", script=False, on_step=weaken)
    assert torch.equal(webui.draw("a house", True, ["star"], on_step=weaken), changing)
    sampled = [webui.draw("a star", True, ["star"], "", True, b, negative_prompt="a star", on_step=weaken) for b in ("exact", "fused")]
    assert torch.allclose(*sampled, atol=1e-3)
