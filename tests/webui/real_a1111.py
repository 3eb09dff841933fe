"""The host adapter on the UNet that Automatic1111 runs (``ldm``) and its own checkpointing of it, on a tiny model.

``python real_a1111.py WEBUI`` with einops installed; asserts, and says what it did.
"""

# ruff: noqa: E402 (what is imported depends on paths set here)
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT, WEBUI = Path(__file__).resolve().parents[2], Path(sys.argv[1])
sys.path[:0] = [str(ROOT / "tests" / "webui" / "host"), str(ROOT / "tests"), str(WEBUI / "repositories" / "stable-diffusion-stability-ai")]
sys.modules["modules.ui_components"] = SimpleNamespace(InputAccordion=None)  # type: ignore[assignment]
for name, folder in (("sepme_extension", ""), ("sepme_extension.scripts", "scripts"), ("sepme_extension.scripts.webui", "scripts/webui")):
    package = ModuleType(name)
    package.__path__ = [str(ROOT / folder)]
    sys.modules[name] = package

spec = importlib.util.spec_from_file_location("modules.sd_hijack_checkpoint", WEBUI / "modules" / "sd_hijack_checkpoint.py")
assert spec is not None
assert spec.loader is not None
checkpointing = importlib.util.module_from_spec(spec)
sys.modules["modules.sd_hijack_checkpoint"] = checkpointing
spec.loader.exec_module(checkpointing)

sys.modules["omegaconf"] = ModuleType("omegaconf")
sys.modules["omegaconf.listconfig"] = SimpleNamespace(ListConfig=list)

import modules
import modules.shared
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from modules import toy
from modules.processing import StableDiffusionProcessingTxt2Img, process_images
from sepme_extension.scripts.webui import host
from sepme_extension.scripts.webui.settings import Settings, Tables
from sepme_extension.sepme.apply.composition import Composition
from sepme_extension.sepme.concepts import ConceptBook
from sepme_extension.sepme.delta.concept_delta import ConceptDelta
from sepme_extension.sepme.plan.planner import Planner
from sepme_extension.sepme.train import TrainOptions, make_delta

modules.sd_hijack_checkpoint = checkpointing


def checkpoint(recompute: bool) -> Any:
    torch.manual_seed(0)
    unet = UNetModel(
        image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1, attention_resolutions=[1, 2], channel_mult=(1, 2),
        num_heads=2, use_spatial_transformer=True, transformer_depth=1, context_dim=toy.D_IN, use_checkpoint=recompute, legacy=False,
    )  # fmt: skip
    for parameter in unet.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape)  # zero modules would hide everything
    model = toy.Checkpoint(kind="a1111")
    model.model = toy.DiffusionWrapper(unet.eval())
    return model


def trained(model: Any) -> ConceptDelta:
    modules.shared.sd_model = model
    with host.loaded_model() as loaded:
        planner = Planner(loaded, ConceptBook.loads("concepts: [star, heart]"))
        return make_delta(planner, "star", loaded, TrainOptions(steps=10, batch=2, trajectories=2, warm_start=False))


def main() -> None:
    plain = trained(checkpoint(recompute=False))
    model = checkpoint(recompute=True)
    checkpointing.add()
    delta = trained(model)
    assert checkpointing.stored, "the host's checkpointing was not put back"
    assert delta.info["losses"] == plain.info["losses"]
    assert delta.content_hash() == plain.content_hash()
    print("training is the same with and without the host's recomputing of blocks")
    checkpointing.remove()

    def draw(on_step: Any = lambda p, step: None) -> torch.Tensor:
        p = StableDiffusionProcessingTxt2Img(prompt=["a star", "a star"], seed=0, batch_size=2, steps=3)
        p.on_step = on_step
        return process_images(p)[0]

    stock, state = draw(), {k: v.clone() for k, v in model.unet.state_dict().items()}
    attached: list[Any] = []

    def attach(p: Any, step: int) -> None:
        if step == 0:
            tables = Tables.make(Composition((delta,)), {}, [{"star": 1.0}, {"star": 0.0}], [{}, {}])
            attached.append(host.ModelPatch(p, tables, Settings(), lambda text: None))
            modules.script_callbacks.callbacks["cfg_denoiser"].append(attached[0].expect)

    sampled = draw(on_step=attach)
    modules.script_callbacks.callbacks["cfg_denoiser"].clear()
    assert torch.equal(sampled[1], stock[1])
    assert not torch.equal(sampled[0], stock[0])
    attached[0].detach()
    assert torch.equal(draw(), stock)
    assert all(torch.equal(v, state[k]) for k, v in model.unet.state_dict().items())
    assert not [n for n, m in model.model.named_modules() if "forward" in m.__dict__]
    print("rows of a batch, restored: bit-identical; no forward of ours is left")


if __name__ == "__main__":
    main()
