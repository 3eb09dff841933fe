"""Models beyond Stable Diffusion on a real server: load, train in closed form, erase, sample, restore.

They are ComfyUI's own classes with their own text encoders, tiny; those that this ComfyUI lacks are left out (SEPME_COMFYUI may name a
newer one).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.graph import Graph
from comfyui.server import Server
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("comfyui inside")

ERASED, SPARED = "a painting by van gogh", "a red car"


class Scene(Graph):
    """A family's model and its text encoder."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.model = self.add("TinyFamily", name=family)
        self.negative = self.text(self.model[1], "")

    def train(self) -> Any:
        concepts = self.add("SepMEConcept", name="van gogh", prompts="van gogh\na painting by van gogh")
        return self.add(
            "SepMETrain", model=self.model[0], clip=self.model[1], concepts=concepts[0], erase="*", objective="closed-form", edit="context",
            preserve=SPARED,
        )  # fmt: skip

    def latents(self, model: Any, prompt: Any, name: str) -> None:
        latent = self.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        samples = self.add(
            "KSampler", model=model, positive=prompt, negative=self.negative[0], latent_image=latent[0], seed=1, steps=3, cfg=2.0,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        self.add("SaveLatent", samples=samples[0], filename_prefix=name)


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "wan", "anima"])
def test_load_train_erase_restore(checkpoint_server: Server, family: str) -> None:
    server = checkpoint_server
    if family not in server.get("/object_info")["TinyFamily"]["input"]["required"]["name"][0]:
        pytest.skip("This ComfyUI is older than the model")
    scene = Scene(family)
    model = scene.add("SepMEApply", model=scene.model[0], deltas=scene.train()[0])
    texts = {text: scene.text(scene.model[1], text)[0] for text in (ERASED, SPARED)}
    off = scene.add("SepMETextEncode", clip=scene.model[1], text=f"{ERASED} <keep:van gogh>")
    for name, patched, prompt in (
        ("stock", scene.model, texts[ERASED]), ("erased", model, texts[ERASED]), ("restored", model, off[0]),
        ("stock of another", scene.model, texts[SPARED]), ("spared", model, texts[SPARED]),
    ):  # fmt: skip
        scene.latents(patched[0], prompt, f"{family}/{name}")
    run = server.run(scene.prompt)
    assert run.error is None, run.message
    found = {p.stem.split("_0")[0]: load_file(p)["latent_tensor"] for p in (Path(server.base) / "output" / family).glob("*.latent")}
    assert found["stock"].isfinite().all()
    effect = (found["stock of another"] - found["stock"]).abs().max()
    assert (found["erased"] - found["stock"]).abs().max() > 0.05 * effect
    assert torch.equal(found["restored"], found["stock"])
    assert torch.equal(found["spared"], found["stock of another"])
    assert not torch.equal(found["spared"], found["stock"])


def test_a_delta_of_another_text_encoder_is_refused_by_name(checkpoint_server: Server) -> None:
    """T5 of Flux and umT5 of Wan have equally many channels."""
    scene, other = Scene("flux"), Scene("wan")
    other.prompt = scene.prompt = scene.prompt | {f"other {k}": v for k, v in other.prompt.items()}
    model = scene.add("SepMEApply", model=["other TinyFamily0", 0], deltas=scene.train()[0])
    scene.latents(model[0], scene.text(scene.model[1], ERASED)[0], "refused")
    run = checkpoint_server.run(scene.prompt)
    assert "was made with the text encoder T5-XXL, and this model reads umT5-XXL" in run.message
