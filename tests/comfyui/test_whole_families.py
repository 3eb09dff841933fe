"""Models beyond Stable Diffusion on a real server: load, train, erase, sample, restore.

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
from torch import Tensor

pytestmark = pytest.mark.xdist_group("comfyui inside")

ERASED, SPARED, SECOND = "a painting by van gogh", "a red car", "a drawing by picasso"
NAMES = {"van gogh": ERASED, "picasso": SECOND}


class Scene(Graph):
    """A family's model and its text encoder."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.model = self.add("TinyFamily", name=family)
        self.negative = self.text(self.model[1], "")

    def train(self, edit: str = "context", objective: str = "closed-form", **more: Any) -> Any:
        concepts = self.add("SepMEConcept", name="van gogh", prompts="van gogh\na painting by van gogh")
        return self.add(
            "SepMETrain", model=self.model[0], clip=self.model[1], concepts=concepts[0], erase="*", objective=objective, edit=edit,
            preserve=SPARED, **more,
        )  # fmt: skip

    def latents(self, model: Any, prompt: Any, name: str) -> None:
        side = 512 if self.family == "pixart" else 64  # whose places have no names below that
        latent = self.add("EmptySD3LatentImage", width=side, height=side, batch_size=1)
        samples = self.add(
            "KSampler", model=model, positive=prompt, negative=self.negative[0], latent_image=latent[0], seed=1, steps=3, cfg=2.0,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        self.add("SaveLatent", samples=samples[0], filename_prefix=name)

    def sampled(self, server: Server, folder: str, prompts: dict[str, tuple[Any, Any]]) -> dict[str, Tensor]:
        """Latents by name, of a MODEL and a prompt each."""
        for name, (patched, prompt) in prompts.items():
            self.latents(patched, prompt, f"{folder}/{name}")
        run = server.run(self.prompt)
        assert run.error is None, run.message
        found = {p.stem.split("_0")[0]: load_file(p)["latent_tensor"] for p in (Path(server.base) / "output" / folder).glob("*.latent")}
        assert [name for name, latent in found.items() if not latent.isfinite().all()] == []
        return found


def known(server: Server, family: str) -> None:
    if family not in server.get("/object_info")["TinyFamily"]["input"]["required"]["name"][0]:
        pytest.skip("This ComfyUI is older than the model")


def test_train_by_an_objective(checkpoint_server: Server) -> None:
    """Through the model, by its own sampling; its objective alone moves the delta, which begins as no change."""
    scene = Scene("qwen_image")
    stock, trained = scene.model[0], scene.train("context", "esd", steps=8, size=64, batch=2)
    model = scene.add("SepMEApply", model=stock, deltas=trained[0])[0]
    texts = {text: scene.text(scene.model[1], text)[0] for text in (ERASED, SPARED)}
    off = scene.add("SepMETextEncode", clip=scene.model[1], text=f"{ERASED} <keep:van gogh>")[0]
    found = scene.sampled(checkpoint_server, "trained", {
        "stock": (stock, texts[ERASED]), "erased": (model, texts[ERASED]), "restored": (model, off),
        "stock of another": (stock, texts[SPARED]), "spared": (model, texts[SPARED]),
    })  # fmt: skip
    assert not torch.equal(found["erased"], found["stock"])
    assert torch.equal(found["restored"], found["stock"])
    assert torch.equal(found["spared"], found["stock of another"])


def test_what_an_objective_asks_is_said(checkpoint_server: Server) -> None:
    for objective, edit, said in (("fmn", "context", "fmn is for Stable Diffusion"), ("gcirs", "layers", "choose the edit context")):
        scene = Scene("qwen_image")
        scene.latents(
            scene.add("SepMEApply", model=scene.model[0], deltas=scene.train(edit, objective)[0])[0], scene.negative[0], "refused"
        )
        assert said in checkpoint_server.run(scene.prompt).message


@pytest.mark.parametrize(
    ("family", "edit"),
    [(f, "context") for f in ("flux", "qwen_image", "z_image", "wan", "anima", "hunyuan_dit", "hidream")]
    + [(f, "layers") for f in ("wan", "anima", "cosmos_predict2", "pixart", "ltxv", "hunyuan_dit")],
)
def test_load_train_erase_restore(checkpoint_server: Server, family: str, edit: str) -> None:
    known(checkpoint_server, family)
    scene = Scene(family)
    stock, model = scene.model[0], scene.add("SepMEApply", model=scene.model[0], deltas=scene.train(edit)[0])[0]
    texts = {text: scene.text(scene.model[1], text)[0] for text in (ERASED, SPARED)}
    off = scene.add("SepMETextEncode", clip=scene.model[1], text=f"{ERASED} <keep:van gogh>")[0]
    found = scene.sampled(checkpoint_server, f"{family} {edit}", {
        "stock": (stock, texts[ERASED]), "erased": (model, texts[ERASED]), "restored": (model, off),
        "stock of another": (stock, texts[SPARED]), "spared": (model, texts[SPARED]),
    })  # fmt: skip
    effect = (found["stock of another"] - found["stock"]).abs().max()
    share = 1e-5 if (family, edit) == ("hunyuan_dit", "layers") else 0.05  # whose second text says most, and has no layers of its own
    assert (found["erased"] - found["stock"]).abs().max() > share * effect
    assert torch.equal(found["restored"], found["stock"])
    assert torch.equal(found["spared"], found["stock of another"])
    assert not torch.equal(found["spared"], found["stock"])


@pytest.mark.parametrize("family", ["sd3", "hunyuan_video", "flux2", "kandinsky5", "krea2"])
def test_a_name_and_a_delta_in_sepme_erase(checkpoint_server: Server, family: str) -> None:
    known(checkpoint_server, family)
    scene = Scene(family)
    stock, clip = scene.model[0], scene.model[1]
    model = scene.add("SepMEErase", model=stock, clip=clip, concepts="picasso", deltas=scene.train()[0], preserve=SPARED)[0]
    texts = {text: scene.text(clip, text)[0] for text in (ERASED, SECOND, SPARED)}
    off = {name: scene.add("SepMETextEncode", clip=clip, text=f"{text} <keep:{name}>")[0] for name, text in NAMES.items()}
    found = scene.sampled(checkpoint_server, family, {
        "stock": (stock, texts[ERASED]), "erased": (model, texts[ERASED]), "restored": (model, off["van gogh"]),
        "second stock": (stock, texts[SECOND]), "second erased": (model, texts[SECOND]), "second restored": (model, off["picasso"]),
        "stock of another": (stock, texts[SPARED]), "spared": (model, texts[SPARED]),
    })  # fmt: skip
    for which in ("", "second "):
        effect = (found["stock of another"] - found[f"{which}stock"]).abs().max()
        assert (found[f"{which}erased"] - found[f"{which}stock"]).abs().max() > 0.05 * effect
        assert torch.equal(found[f"{which}restored"], found[f"{which}stock"])
    assert torch.equal(found["spared"], found["stock of another"])


def test_a_delta_of_another_text_encoder_is_refused_by_name(checkpoint_server: Server) -> None:
    """T5 of Flux and umT5 of Wan have equally many channels."""
    scene, other = Scene("flux"), Scene("wan")
    other.prompt = scene.prompt = scene.prompt | {f"other {k}": v for k, v in other.prompt.items()}
    model = scene.add("SepMEApply", model=["other TinyFamily0", 0], deltas=scene.train()[0])
    scene.latents(model[0], scene.text(scene.model[1], ERASED)[0], "refused")
    run = checkpoint_server.run(scene.prompt)
    assert "was made with the text encoder T5-XXL, and this model reads umT5-XXL" in run.message
