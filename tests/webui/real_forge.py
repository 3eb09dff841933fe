"""The host adapter on Forge's own ``backend/``: its UNet, patcher, LoRAs, memory management and sampling function, on a tiny model.

Run with a Forge checkout as working folder: ``python real_forge.py [NEGPIP]``, the checkout of an extension that is run beside ours;
asserts, and says what it did.
"""

# ruff: noqa: E402 (what is imported depends on paths set here)
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
NEGPIP = Path(sys.argv[1]) if len(sys.argv) > 1 else None
NEO = not Path("packages_3rdparty").is_dir()
sys.argv = [sys.argv[0], *(["--cpu"] if NEO else ["--always-cpu", "--disable-xformers"])]
sys.path[:0] = [
    str(ROOT / "tests" / "webui" / "host"),
    str(ROOT / "tests"),
    os.getcwd(),
    os.path.join(os.getcwd(), "modules_forge/packages" if NEO else "packages_3rdparty"),
]  # the host's modules are doubles, backend is real
sys.modules["modules.ui_components"] = SimpleNamespace(InputAccordion=None)  # type: ignore[assignment]
for name, folder in (("sepme_extension", ""), ("sepme_extension.scripts", "scripts"), ("sepme_extension.scripts.webui", "scripts/webui")):
    package = ModuleType(name)
    package.__path__ = [str(ROOT / folder)]
    sys.modules[name] = package

import modules.sd_samplers_kdiffusion
import modules.shared
from backend.modules.k_prediction import Prediction
from backend.nn.unet import IntegratedUNet2DConditionModel
from backend.operations import using_forge_operations
from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import sampling_cleanup, sampling_function, sampling_prepare
from conftest import TinyEncoder
from modules.prompt_parser import words
from sepme_extension.scripts.webui import host
from sepme_extension.scripts.webui.settings import Settings, Tables
from sepme_extension.sepme.apply.composition import Composition
from sepme_extension.sepme.concepts import ConceptBook
from sepme_extension.sepme.plan.planner import Planner
from sepme_extension.sepme.train import TrainOptions, make_delta

modules.sd_samplers_kdiffusion.sampling_prepare = sampling_prepare
D_IN = 192


class Engine:
    """A Forge engine around a tiny UNet."""

    is_inpaint = is_sdxl = False
    text_processing_engine = SimpleNamespace(tokenize_line=lambda text: (words(text), len(words(text))))

    def __init__(self) -> None:
        torch.manual_seed(0)
        with torch.inference_mode(), using_forge_operations(device=torch.device("cpu"), dtype=torch.float32):
            unet = IntegratedUNet2DConditionModel(
                in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[1, 1], channel_mult=(1, 2), num_heads=2,
                use_spatial_transformer=True, transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1, 1, 1, 1],
                context_dim=D_IN,
            )  # fmt: skip
            state = {}
            for name, module in unet.named_modules():  # Forge's Linear has no weight until a checkpoint is loaded
                if hasattr(module, "in_features"):
                    state[f"{name}.weight"] = torch.randn(module.out_features, module.in_features) / module.in_features**0.5
                    if not name.endswith(("to_q", "to_k", "to_v")):
                        state[f"{name}.bias"] = torch.zeros(module.out_features)
            rest = {k: 0.1 * torch.randn_like(v) for k, v in unet.state_dict().items() if not k.endswith("dummy") and k not in state}
            rest |= {k: torch.ones_like(v) for k, v in rest.items() if v.dim() == 1 and k.endswith("weight")}
            unet.load_state_dict(state | rest, strict=False)
        unet.storage_dtype = unet.computation_dtype = torch.float32
        unet.load_device = unet.offload_device = unet.initial_device = torch.device("cpu")
        schedule = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
        predictor = Prediction(sigma_data=1.0, prediction_type="epsilon", **schedule)
        config = SimpleNamespace(memory_usage_factor=1.0)
        patcher = UnetPatcher.from_model(unet.eval(), diffusers_scheduler=None, config=config, k_predictor=predictor)
        unet.image_size = 8  # latents that it trains on
        self.encoder = TinyEncoder(D_IN, 77)
        objects = SimpleNamespace(unet=patcher)
        objects.shallow_copy = lambda: SimpleNamespace(unet=patcher, shallow_copy=objects.shallow_copy)
        self.forge_objects_original, self.forge_objects = objects, objects.shallow_copy()

    @torch.inference_mode()
    def get_learned_conditioning(self, prompts: Any) -> torch.Tensor:
        return self.encoder.encode(list(prompts)).context

    def get_prompt_lengths_on_ui(self, prompt: str) -> tuple[int, int]:
        return len(words(prompt)), 75


@torch.inference_mode()
def draw(engine: Engine, prompts: list[str], negative: str = "", parts: int = 1, steps: int = 3, on_step: Any = None) -> torch.Tensor:
    """Denoised latents by Forge's own sampling function."""
    unet = engine.forge_objects.unet
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = torch.cat([engine.get_learned_conditioning([p]) for p in prompts for _ in range(parts)])
    uncond = torch.cat([engine.get_learned_conditioning([negative])] * len(prompts))
    weights = [[(i * parts + j, 1.0 / parts) for j in range(parts)] for i in range(len(prompts))]
    denoiser = SimpleNamespace(inner_model=SimpleNamespace(inner_model=engine), p=SimpleNamespace(seeds=[0]))
    sampling_prepare(unet, x=x)
    for step, sigma in enumerate(torch.linspace(8, 0.5, steps)):
        params = SimpleNamespace(x=x, sigma=sigma.expand(len(x)), text_cond=cond, text_uncond=uncond, image_cond=None, sampling_step=step)
        if on_step is not None:
            on_step(params)
        denoised, _, _ = sampling_function(denoiser, params, cond_scale=4.0, cond_composition=weights)
        x = x + (denoised - x) * 0.3
    sampling_cleanup(unet)
    return x


def lora(up: torch.Tensor, down: torch.Tensor) -> Any:
    """A LoRA of alpha 2 as the host's own loader hands it to its patcher."""
    weights = (up, down, 2.0, None, None, None)
    if not NEO:
        return "lora", weights
    from modules_forge.packages.comfy.weight_adapter.lora import LoRAAdapter

    return LoRAAdapter(set(), weights)


def main() -> None:
    engine = Engine()
    modules.shared.sd_model = engine
    book, deltas = ConceptBook.loads("concepts: [star, heart]"), []
    with host.loaded_model() as model:
        planner = Planner(model, book)
        deltas.append(make_delta(planner, "star", model, TrainOptions.for_mode(objective="closed-form")))
        deltas.append(make_delta(planner, "heart", model, TrainOptions(steps=12, batch=2, trajectories=2)))
    assert len(deltas[1].info["losses"]) >= 10
    composition, said = Composition(tuple(deltas)), []

    def attached(positive: list[dict[str, float]], negative: dict[str, float] | None = None, panel: Any = None, **more: Any) -> Any:
        p = SimpleNamespace(sd_model=engine)
        tables = Tables.make(composition, panel or {}, positive, [negative or {}] * len(positive))
        return host.ModelPatch(p, tables, Settings(**more), said.append)

    pair = ["a star", "a star"]
    stock = draw(engine, pair)
    before = {k: v.clone() for k, v in engine.forge_objects.unet.model.diffusion_model.state_dict().items()}
    erasing = attached([{}, {"star": 1.0}])
    mixed = draw(engine, pair)
    assert torch.equal(mixed[0], stock[0]), "a row without tags changed"
    assert not torch.equal(mixed[1], stock[1])
    erasing.detach()
    assert torch.equal(draw(engine, pair), stock), "not restored"
    print("rows of a batch, restored: bit-identical")

    erasing = attached([{"star": 0.0}], panel={"star": 1.0})
    assert torch.equal(draw(engine, ["a star"]), draw_stock(engine, erasing, ["a star"]))
    erasing = attached([{"star": 1.0}, {}])
    composed = draw(engine, pair, parts=2)
    assert torch.equal(composed[1], draw_stock(engine, erasing, pair, parts=2)[1])
    print("AND: bit-identical in the other row")

    erasing = attached([{}], {"star": 1.0})
    negative = draw(engine, ["a star"], negative="a star")
    assert not torch.equal(negative, draw_stock(engine, erasing, ["a star"], negative="a star"))

    for online in (False, True):  # LoRAs merged into the weights, and added at run time
        name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
        patched = engine.forge_objects.unet.clone()
        up, down = torch.randn(64, 2), torch.randn(2, D_IN) / D_IN**0.5
        assert patched.add_patches(filename="x", patches={name: lora(up, down)}, online_mode=online)
        plain, engine.forge_objects.unet = engine.forge_objects.unet, patched
        with_lora = draw(engine, pair)
        assert not torch.equal(with_lora, stock)
        erasing = attached([{}, {"star": 1.0}])
        both = draw(engine, pair)
        assert torch.equal(both[0], with_lora[0])
        assert not torch.equal(both[1], with_lora[1])
        erasing.detach()
        assert torch.equal(draw(engine, pair), with_lora)
        erasing = attached([{}, {"star": 1.0}], backend="fused")  # must not leave the LoRA out
        assert torch.allclose(draw(engine, pair), both, atol=1e-3)
        erasing.detach()
        engine.forge_objects.unet = plain
        assert torch.allclose(draw(engine, pair), stock, atol=1e-5)
        print(f"with a LoRA ({'at run time' if online else 'merged'}): bit-identical in the other row")

    edits_of_the_context(engine, book)
    flow(flux, flux_cond)
    if NEO:
        flow(z_image, z_image_cond)
    if NEGPIP is not None:
        beside_negpip(engine, NEGPIP, attached)
    sampled = []
    for backend in ("exact", "fused"):
        erasing = attached([{"star": 1.0}, {"star": 1.0}], {"star": 1.0}, backend=backend)
        sampled.append(draw(engine, pair, negative="a star"))
        erasing.detach()
    assert torch.allclose(*sampled, atol=1e-3)
    draw(engine, pair)
    unet = engine.forge_objects.unet.model.diffusion_model
    assert not [n for n, m in unet.named_modules() if isinstance(m.__dict__.get("forward"), host.Hook)]
    after = unet.state_dict()
    assert list(after) == list(before)
    assert set(said) == {
        "backend fused: this model's weights are cast, patched or offloaded while it runs; exact is used instead.",  # the second LoRA
        "backend fused: there is no kernel for cpu; plain PyTorch does the same here.",
    }, said
    print("unpatched: no forward of ours is left; rows were always known")


def edits_of_the_context(engine: Engine, book: Any) -> None:
    """On what the host tells its callbacks: no patch, equal to the closed form of the layers, exact in the other row."""
    pair, deltas = ["a star", "a star"], {}
    with host.loaded_model() as model:
        planner = Planner(model, book)
        for edit in ("context", "layers"):
            deltas[edit] = make_delta(planner, "star", model, TrainOptions.for_mode(objective="closed-form", edit=edit))
    stock, sampled = draw(engine, pair), {}
    for edit, delta in deltas.items():
        tables = Tables.make(Composition((delta,)), {}, [{}, {"star": 1.0}], [{}, {}])
        before = engine.forge_objects.unet
        erasing = host.ModelPatch(SimpleNamespace(sd_model=engine), tables, Settings(), print)
        assert (engine.forge_objects.unet is before) == (edit == "context")
        sampled[edit] = draw(engine, pair, on_step=erasing.expect)
        erasing.detach()
        assert torch.equal(sampled[edit][0], stock[0])
    assert (sampled["layers"][1] - stock[1]).abs().max() > 0.01
    torch.testing.assert_close(sampled["context"], sampled["layers"], rtol=0, atol=2e-3)
    assert torch.equal(draw(engine, pair), stock)
    print("edit of the context: no patch, as the layers do, bit-identical in the other row")


FLOW_WIDTH, FLOW_VECTOR = 64, 16  # of the context, of the pooled vector


class Cond(dict):  # type: ignore[type-arg]
    """As the host hands out rows of it."""

    def advanced_indexing(self, rows: list[int]) -> Cond:
        return Cond({key: value[rows] for key, value in self.items()})


def flux() -> tuple[Any, Any]:
    """Flux.1 and its flow: a context of one length, and a vector."""
    from backend.modules.k_prediction import PredictionDiscreteFlow
    from backend.nn.flux import IntegratedFluxTransformer2DModel

    more = {"out_channels": 4, "patch_size": 2} if NEO else {}
    model = IntegratedFluxTransformer2DModel(
        in_channels=4, vec_in_dim=FLOW_VECTOR, context_in_dim=FLOW_WIDTH, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False, **more,
    )  # fmt: skip
    return model, PredictionDiscreteFlow(SimpleNamespace(sampling_settings={})) if NEO else PredictionDiscreteFlow(shift=1.0)


def flux_cond(read: Any) -> Any:
    return Cond({"crossattn": read.context, "vector": read.pooled, "guidance": torch.full((len(read.context),), 3.5)})


def z_image() -> tuple[Any, Any]:
    """Z-Image and its flow, which Neo's backend has: a context alone, as long as the prompt."""
    from backend.modules.k_prediction import PredictionDiscreteFlow
    from backend.nn.lumina import NextDiT

    model = NextDiT(
        in_channels=4, dim=256, n_layers=1, n_refiner_layers=1, n_heads=8, n_kv_heads=8, multiple_of=8, ffn_dim_multiplier=1.0,
        qk_norm=True, cap_feat_dim=FLOW_WIDTH, axes_dims=[8, 12, 12], axes_lens=[64, 64, 64], z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32,
    )  # fmt: skip
    return model, PredictionDiscreteFlow(SimpleNamespace(sampling_settings={"multiplier": 1.0, "shift": 3.0}))


def z_image_cond(read: Any) -> Any:
    """Each prompt's own tokens, the last repeated to the longest: what the host stacks."""
    rows = [context[mask] for context, mask in zip(read.context, read.mask, strict=True)]
    return torch.stack([torch.cat([row, row[-1:].expand(max(map(len, rows)) - len(row), -1)]) for row in rows])


def flow(build: Callable[[], tuple[Any, Any]], cond_of: Callable[[Any], Any]) -> None:
    """A model of the host's own backend that is no UNet: on the conditioning, its vector included; no patch, exact in the other rows."""
    from backend.patcher.unet import UnetPatcher

    torch.manual_seed(0)
    with torch.inference_mode(), using_forge_operations(device=torch.device("cpu"), dtype=torch.float32):
        model, predictor = build()
        state = {}
        for name, module in model.named_modules():
            if hasattr(module, "in_features"):
                state[f"{name}.weight"] = torch.randn(module.out_features, module.in_features) / module.in_features**0.5
                state[f"{name}.bias"] = torch.zeros(module.out_features)
        state |= {k: torch.ones_like(v) for k, v in model.state_dict().items() if not k.endswith("dummy") and k not in state}
        model.load_state_dict(state, strict=False)
    model.storage_dtype = model.computation_dtype = torch.float32
    model.load_device = model.offload_device = model.initial_device = torch.device("cpu")
    config = SimpleNamespace(memory_usage_factor=1.0)
    patcher = UnetPatcher.from_model(model.eval(), diffusers_scheduler=None, config=config, k_predictor=predictor)
    reader = TinyEncoder(FLOW_WIDTH, 32)

    class Checkpoint:
        forge_objects = SimpleNamespace(unet=patcher)

        @staticmethod
        def encode(prompts: Any) -> Any:
            encoding = reader.encode(list(prompts))
            return encoding if build is z_image else encoding._replace(pooled=encoding.context[:, -1, :FLOW_VECTOR].clone())

    book = ConceptBook.loads("concepts: [star, heart]")
    delta = make_delta(Planner(Checkpoint, book), "star", None, TrainOptions.for_mode(objective="closed-form", edit="context"))
    assert host.architectures_of(Checkpoint) == (f"context-{FLOW_WIDTH}",) == (delta.architecture,)
    assert (delta.pooled is None) == (build is z_image)

    @torch.inference_mode()
    def sampled(prompts: list[str], on_step: Any = None) -> torch.Tensor:
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(len(prompts), 1, 1, 1)
        cond = cond_of(Checkpoint.encode(prompts))
        denoiser = SimpleNamespace(inner_model=SimpleNamespace(inner_model=Checkpoint), p=SimpleNamespace(seeds=[0]))
        sampling_prepare(patcher, x=x)
        for step, sigma in enumerate(torch.linspace(1, 0.3, 3)):
            params = SimpleNamespace(x=x, sigma=sigma.expand(len(x)), text_cond=cond, text_uncond=None, image_cond=None, sampling_step=step)
            if on_step is not None:
                on_step(params)
            denoised, _, _ = sampling_function(denoiser, params, cond_scale=1.0, cond_composition=[[(i, 1.0)] for i in range(len(prompts))])
            x = x + (denoised - x) * 0.3
        sampling_cleanup(patcher)
        return x

    prompts = ["a star", "a star", "a heart on a hill"]
    stock = sampled(prompts)
    tables = Tables.make(Composition((delta,)), {"star": 1.0}, [{}, {"star": 0.0}, {}], [{}] * 3)
    erasing = host.ModelPatch(SimpleNamespace(sd_model=Checkpoint), tables, Settings(), print)
    erased = sampled(prompts, erasing.expect)
    erasing.detach()
    assert [i for i in range(3) if not torch.equal(erased[i], stock[i])] == [0]
    assert stock.isfinite().all()
    assert Checkpoint.forge_objects.unet is patcher
    assert torch.equal(sampled(prompts), stock)
    other = make_delta(Planner(TinyEncoder(48, 32), book), "star", None, TrainOptions.for_mode(objective="closed-form", edit="context"))
    try:
        host.ModelPatch(SimpleNamespace(sd_model=Checkpoint), Tables.make(Composition((other,)), {}, [{}], [{}]), Settings(), print)
    except Exception as error:
        assert f"this checkpoint reads context-{FLOW_WIDTH}" in str(error)
    else:
        raise AssertionError("another width is accepted")
    print(f"{build.__name__}: the conditioning alone is edited, bit-identical in the other rows")


def beside_negpip(engine: Engine, checkout: Path, attached: Any) -> None:
    """Rows and a negative prompt with tags of their own, while NegPip splits the batch and turns values round."""
    import negpip

    module = negpip.load(checkout)
    assert module.forge
    script = module.Script()

    def sampled(prompts: list[str], negative: str = "", tags: Any = None) -> torch.Tensor:
        p = SimpleNamespace(
            sd_model=engine, batch_size=len(prompts), sampler_name="Euler", steps=3, width=64, height=64, extra_generation_params={},
            prompts=[f"{prompt} {negpip.PART}" for prompt in prompts], negative_prompts=[negative] * len(prompts),
        )  # fmt: skip
        with torch.inference_mode():
            script.process_batch(p, True)
        erasing = attached(*tags) if tags else None
        try:
            return draw(engine, p.prompts, negative, on_step=script.denoiser_callback)
        finally:
            script.postprocess(p, None)
            if erasing is not None:
                erasing.detach()

    pair = ["a star", "a star"]
    stock = sampled(pair, "a house")
    assert not torch.equal(stock, draw(engine, pair, "a house")), "NegPip does nothing"
    for erased, preserved in ((0, 1), (1, 0)):
        mixed = sampled(pair, "a house", ([{"star": 1.0} if i == erased else {"star": 0.0} for i in range(2)],))
        assert torch.equal(mixed[preserved], stock[preserved])
        assert not torch.equal(mixed[erased], stock[erased])
    plain, negative = sampled(["a house"], "a star"), sampled(["a house"], "a star", ([{}], {"star": 1.0}))
    assert not torch.equal(negative, plain)
    assert torch.equal(sampled(pair, "a house"), stock)
    print("beside NegPip: bit-identical in the other row")


def draw_stock(engine: Engine, erasing: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    erasing.detach()
    return draw(engine, *args, **kwargs)


if __name__ == "__main__":
    main()
