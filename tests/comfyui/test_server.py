"""Workflows on a real server, over HTTP and websocket, as a browser queues them."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui.graph import Graph, Node, from_workflow
from comfyui.server import Run, Server
from PIL import Image

from sepme.delta.concept_delta import ConceptDelta
from sepme.demo.emoji.things import STYLES
from sepme.evaluate.network import Network

pytestmark = pytest.mark.xdist_group("comfyui")

# The public interface: required and optional inputs, outputs. Workflows of users depend on it.
INTERFACE = {
    "SepMEErase": (["model", "clip", "concepts"], ["deltas", "preserve", "gate"], ["MODEL", "DELTAS"]),
    "SepMEDemoModel": ([], [], ["MODEL", "CLIP", "VAE"]),
    "SepMELoadCheckpoint": (["ckpt_name"], [], ["MODEL", "CLIP", "VAE", "STRING"]),
    "SepMEConcept": (["name"], ["prompts", "anchor", "concepts"], ["CONCEPTS"]),
    "SepMEConceptBook": (["book"], ["concepts"], ["CONCEPTS"]),
    "SepMETrain": (
        ["model", "clip", "concepts"],
        [
            "erase",
            "preserve",
            "objective",
            "mode",
            "steps",
            "learning_rate",
            "seed",
            "max_rank",
            "deltas",
            "size",
            "edit",
            "batch",
            "nearby",
        ],
        ["DELTAS", "LOSS_MAP", "STRING"],
    ),
    "SepMESaveDeltas": (["deltas"], ["filename_prefix", "embed"], ["DELTAS"]),
    "SepMELoadDelta": (["delta"], ["content_hash", "deltas"], ["DELTAS"]),
    "SepMEApply": (["model", "deltas"], ["toggles", "backend", "gate"], ["MODEL"]),
    "SepMETextEncode": (["clip", "text"], ["toggles"], ["CONDITIONING", "STRING"]),
    "SepMEConditioningToggles": (["conditioning", "toggles"], [], ["CONDITIONING"]),
    "SepMEVerify": (["clip", "deltas"], [], ["STRING", "IMAGE"]),
    "SepMECompare": (
        ["model", "positive", "negative", "latent_image", "vae", "seed", "steps", "cfg", "sampler_name", "scheduler"],
        ["clip", "strengths"],
        ["IMAGE", "IMAGE", "IMAGE"],
    ),
    "SepMEExport": (["deltas"], ["format", "filename_prefix", "model"], []),
}
THINGS = "star", "rocket", "church", "airplane", "tulip", "mushroom"
BOOK = json.dumps(
    {
        "concepts": [
            *({"name": n, "prompts": [n, f"a {n}", f"a picture of a {n}", f"a drawing of a {n}"]} for n in THINGS),
            *(
                {"name": n, "prompts": [f"{n} style", f"a picture by {n}", f"an emoji by {n}", f"something in {n} style"]}
                for n in STYLES[:6]
            ),
        ],
        "preserve": ["a picture", "a picture on a red background", "a picture on a blue background"],
    }
)
CLASSIFIER = Network.load(Path(__file__).resolve().parents[2] / "sepme" / "demo" / "model")


def accuracy(images: list[np.ndarray], name: str) -> float:
    """Share of pictures of 128 x 128 in which the classifier reads a thing or a style."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    head, label = CLASSIFIER.place_of(name)
    return float((CLASSIFIER.predict(batch)[:, head] == label).float().mean())


def files(server: Server) -> Path:
    return server.base / "models" / "sepme"


@pytest.fixture(scope="session")
def trained(server: Server) -> Run:
    """Star and openmoji, erased by G-CiRs on the demo model, with ten others known; saved as star.safetensors, openmoji.safetensors."""
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    concepts = graph.add("SepMEConceptBook", book=BOOK)
    made = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=concepts[0], erase="star, openmoji", seed=3, nearby=0)
    graph.add("SepMESaveDeltas", deltas=made[0])
    graph.add("LossGraphNode", loss=made[1], filename_prefix="loss")
    graph.add("PreviewAny", source=made[2])
    run = server.run(graph.prompt)
    assert run.error is None, run.error
    return run


class Scene(Graph):
    """The demo model, with the two trained deltas on it."""

    def __init__(self, toggles: str | None = None, **options: Any) -> None:
        super().__init__()
        self.model = self.add("SepMEDemoModel")
        self.unet = self.model[0]
        if toggles is not None:
            star = self.add("SepMELoadDelta", delta="star.safetensors")
            both = self.add("SepMELoadDelta", delta="openmoji.safetensors", deltas=star[0])
            self.unet = self.add("SepMEApply", model=self.model[0], deltas=both[0], toggles=toggles, **options)[0]

    def draw(self, positive: Any, negative: Any = None, **options: Any) -> Node:
        negative = self.text(self.model[1], "")[0] if negative is None else negative
        return self.show(self.sample(self.unet, positive, negative, **options)[0], self.model[2])


def draw(server: Server, text: str, toggles: str | None = None, options: dict[str, Any] | None = None, **more: Any) -> list[np.ndarray]:
    """Pictures of one prompt."""
    scene = Scene(toggles, **(options or {}))
    shown = scene.draw(scene.text(scene.model[1], text)[0], **more)
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    return run.images[shown]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- the public interface


def test_interface(server: Server) -> None:
    info = {name: node for name, node in server.get("/object_info").items() if name.startswith("SepME")}
    assert set(info) == set(INTERFACE)
    for name, (required, optional, outputs) in INTERFACE.items():
        order = info[name]["input_order"]
        assert (order.get("required", []), order.get("optional", []), info[name]["output"]) == (required, optional, outputs)
        assert info[name]["description"]
        for kind in ("required", "optional"):
            assert all(spec[1].get("tooltip") for spec in info[name]["input"].get(kind, {}).values()), name
    every = {(name, given) for name in info for given, spec in info[name]["input"].get("optional", {}).items() if spec[1].get("advanced")}
    assert {n for _, n in every} == {
        "objective",
        "mode",
        "learning_rate",
        "max_rank",
        "size",
        "edit",
        "batch",
        "nearby",
        "backend",
        "gate",
        "preserve",
    }
    assert ("SepMETrain", "preserve") not in every


def test_minimal_prompts(server: Server) -> None:
    """Every node with nothing but its required inputs; a prompt in API format needs no more."""
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    concept = graph.add("SepMEConcept", name="airplane")
    book = graph.add("SepMEConceptBook", book="[cactus]", concepts=concept[0])
    made = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=book[0])
    graph.add("SepMESaveDeltas", deltas=made[0])
    exported = graph.add("SepMEExport", deltas=made[0])
    verified = graph.add("SepMEVerify", clip=model[1], deltas=made[0])
    unet = graph.add("SepMEApply", model=model[0], deltas=made[0])
    prompt = graph.add("SepMETextEncode", clip=model[1], text="an airplane <keep:cactus>")
    negative = graph.add("SepMEConditioningToggles", conditioning=graph.text(model[1], "")[0], toggles="{}")
    unet = graph.add("SepMEErase", model=unet[0], clip=model[1], concepts="star, twemoji")
    shown = graph.show(graph.sample(unet[0], prompt[0], negative[0])[0], model[2])
    latent, drawing = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1), {"seed": 7, "steps": 2, "cfg": 3.0}
    compared = graph.add(
        "SepMECompare", model=unet[0], positive=prompt[0], negative=negative[0], latent_image=latent[0], vae=model[2], **drawing,
        sampler_name="euler", scheduler="normal",
    )  # fmt: skip
    run = server.run(graph.prompt)
    assert run.error is None, run.error
    assert {name: len(images) for name, images in run.outputs[compared]["sepme_compare"][0].items()} == {"before": 1, "after": 1}
    kinds = {node["class_type"] for node in graph.prompt.values()}
    assert kinds >= set(INTERFACE) - {"SepMELoadCheckpoint", "SepMELoadDelta"}  # elsewhere here, with their one required input
    for node in graph.prompt.values():
        if node["class_type"] in INTERFACE and node["class_type"] != "SepMEConceptBook":
            assert set(node["inputs"]) == set(INTERFACE[node["class_type"]][0])
    assert "airplane: holds" in run.outputs[verified]["text"][0]
    assert run.images[shown]
    assert run.outputs[exported]["text"][0].splitlines() == [str(files(server) / f"{n}.safetensors") for n in ("airplane", "cactus")]


# --- train, save, load, apply, sample, decode


def test_training(server: Server, trained: Run) -> None:
    """Progress through planning and both concepts; the loss falls; LossGraphNode plots it; the report and the files say what was done."""
    progress = [e["data"] for e in trained.events if e["type"] == "progress"]
    values = [p["value"] for p in progress]
    assert progress[-1]["value"] == progress[-1]["max"] == 1000
    assert values == sorted(values)
    assert len({v for v in values if 0 < v < 1000}) >= 3  # newer hosts send a few a second
    assert sum(event["type"] == "sepme.train" for event in trained.events) >= 2  # the page draws the loss curve
    assert trained.images["LossGraphNode0"][0].std() > 0
    text = trained.outputs["PreviewAny0"]["text"][0]
    assert "star: " in text
    assert "behind the gate 0.0000" in text
    for name in ("star", "openmoji"):
        delta = ConceptDelta.load(files(server) / f"{name}.safetensors")
        assert delta.info["objective"]["seed"] == 3
        assert delta.info["losses"][-1] < delta.info["losses"][0]
        assert len(delta.info["known"]) == 11


def test_erased_restored_untouched(server: Server, trained: Run) -> None:
    prompts = {"star": "a star", "openmoji": "a star by openmoji"}
    for name, text in prompts.items():
        stock = draw(server, text, batch=4, size=128)
        assert accuracy(stock, name) >= 0.75
        erased = draw(server, text, json.dumps({"star": 0.0, "openmoji": 0.0, name: 1.0}), batch=4, size=128)
        assert accuracy(erased, name) <= 0.25
        assert same(draw(server, text, json.dumps({"star": 0, "openmoji": 0}), batch=4, size=128), stock)
        assert same(draw(server, text, json.dumps({"star": 0, "openmoji": 0}), {"gate": False}, batch=4, size=128), stock)
    for text in ("a tulip", "a picture", "a glossy church"):
        stock = draw(server, text, batch=4)
        assert same(draw(server, text, "{}", batch=4), stock)
        assert not same(draw(server, text, "{}", {"gate": False}, batch=4), stock)


def test_mixed_toggles_in_one_batch(server: Server, trained: Run) -> None:
    """Two prompts combined, a negative, tags and toggles of their own: a kept prompt's pictures are stock, and the tags beat the rest."""
    scene = Scene("{}")
    preserved = scene.add("SepMETextEncode", clip=scene.model[1], text="a star <keep:star>", toggles='{"star": 1.0}')
    shown = scene.draw(preserved[0], batch=3)
    told = scene.add("PreviewAny", source=preserved[1])
    run = server.run(scene.prompt)
    assert run.outputs[told]["text"] == ["a star"]
    assert same(run.images[shown], draw(server, "a star", batch=3))

    def combined(first: str, second: str) -> list[np.ndarray]:
        scene = Scene("{}")
        one = scene.add("SepMETextEncode", clip=scene.model[1], text=f"a star {first}")
        plain = scene.text(scene.model[1], "a star")
        two = scene.add("SepMEConditioningToggles", conditioning=plain[0], toggles=second)
        both = scene.add("ConditioningCombine", conditioning_1=one[0], conditioning_2=two[0])
        shown = scene.draw(both[0], batch=2)
        run = server.run(scene.prompt)
        assert run.error is None
        return run.images[shown]

    on, off = combined("", "{}"), combined("<keep:star>", '{"star": 0}')
    mixed = combined("<keep:star>", '{"star": 1.0}')
    assert not same(mixed, on)
    assert not same(mixed, off)
    assert same(combined("<keep:star>", '{"STAR": 0.0, "openmoji": 1}'), off)


def test_same_workflow_is_cached_and_a_toggle_reruns_sampling_only(server: Server, trained: Run) -> None:
    def queue(toggles: str) -> Run:
        scene = Scene(toggles)
        scene.draw(scene.add("SepMETextEncode", clip=scene.model[1], text="an openmoji star", toggles="{}")[0])
        return server.run(scene.prompt)

    queue("{}")
    log = server.log.stat().st_size
    assert queue("{}").executed == []
    changed = queue('{"star": 0.5}')
    assert sorted(n.rstrip("0") for n in changed.executed) == ["KSampler", "PreviewImage", "SepMEApply", "VAEDecode"]
    assert b"loaded completely" not in server.log.read_bytes()[log:]


def test_fifty_toggles_do_not_grow_memory(server: Server, trained: Run) -> None:
    def queue(i: int) -> None:
        scene = Scene(json.dumps({"star": i / 100}))
        scene.draw(scene.text(scene.model[1], "an openmoji star")[0], steps=1)
        assert server.run(scene.prompt).error is None

    for i in range(15):
        queue(-1 - i)
    before = server.memory()
    for i in range(50):
        queue(i)
    assert server.memory() - before < 48 << 20  # a leaked MODEL, or its deltas' projections, would be 85 MB in fifty


def test_iterative_erasure(server: Server, trained: Run) -> None:
    """A third concept, made later, knows the first two; they are passed on unchanged."""
    scene = Scene()
    star = scene.add("SepMELoadDelta", delta="star.safetensors")
    concept = scene.add("SepMEConcept", name="tulip", prompts="a tulip\na picture of a tulip\na drawing of a tulip")
    made = scene.add(
        "SepMETrain", model=scene.model[0], clip=scene.model[1], concepts=concept[0], deltas=star[0], objective="closed-form",
        preserve="a red picture\na church",
    )  # fmt: skip
    scene.add("SepMESaveDeltas", deltas=made[0], filename_prefix="later/")
    scene.add("LossGraphNode", loss=made[1], filename_prefix="loss")
    scene.unet = scene.add("SepMEApply", model=scene.model[0], deltas=made[0])[0]
    shown = scene.draw(scene.text(scene.model[1], "a tulip")[0], batch=4, size=128)
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    assert accuracy(run.images[shown], "tulip") <= 0.4
    assert (files(server) / "later/star.safetensors").read_bytes() == (files(server) / "star.safetensors").read_bytes()
    later = ConceptDelta.load(files(server) / "later/tulip.safetensors")
    assert [c["name"] for c in later.info["known"]] == ["star"]
    assert later.info["preserve"]["prompts"] == ["a red picture", "a church"]


def test_the_same_seed_gives_the_same_file(server: Server, trained: Run) -> None:
    def train(seed: int, prefix: str) -> bytes:
        graph = Graph()
        model = graph.add("SepMEDemoModel")
        concept = graph.add("SepMEConcept", name="church")
        made = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=concept[0], steps=12, seed=seed, nearby=0)
        graph.add("SepMESaveDeltas", deltas=made[0], filename_prefix=prefix)
        assert server.run(graph.prompt).error is None
        return (files(server) / f"{prefix}church.safetensors").read_bytes()

    first = train(1, "seeds/a-")
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    assert train(1, "seeds/b-") == first
    assert train(2, "seeds/c-") != first


def test_other_objectives(server: Server) -> None:
    """Each makes a delta of its own that acts on its concept's prompt alone."""
    graph, deltas, shown = Graph(), {}, {}
    model = graph.add("SepMEDemoModel")
    concept = graph.add("SepMEConcept", name="star", prompts="a star\na red star", anchor="a church")
    for objective in ("esd", "sdd", "ablation", "fmn"):
        made = graph.add(
            "SepMETrain", model=model[0], clip=model[1], concepts=concept[0], objective=objective, steps=10, preserve="a tulip\nred",
            nearby=0,
        )  # fmt: skip
        deltas[objective] = graph.add("SepMESaveDeltas", deltas=made[0], filename_prefix=f"objectives/{objective}-")
        unet = graph.add("SepMEApply", model=model[0], deltas=made[0])
        texts = [graph.text(model[1], text)[0] for text in ("a star", "a tulip")]
        shown[objective] = [graph.show(graph.sample(unet[0], t, graph.text(model[1], "")[0], batch=2)[0], model[2]) for t in texts]
    run = server.run(graph.prompt)
    assert run.error is None, run.error
    assert len({next(iter(run.outputs[node]["sepme"][0])) for node in deltas.values()}) == 4
    stock = [draw(server, text, batch=2) for text in ("a star", "a tulip")]
    for star, tulip in shown.values():
        assert not same(run.images[star], stock[0])
        assert same(run.images[tulip], stock[1])


# --- interrupt


def test_interrupt(server: Server, trained: Run) -> None:
    """At once, in the middle of training and of sampling; afterwards nothing is on, and the next pictures are right."""
    stock = draw(server, "a star", batch=2)
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    concept = graph.add("SepMEConcept", name="star")
    made = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=concept[0], mode="paper", steps=100_000, seed=9)
    graph.add("SepMESaveDeltas", deltas=made[0], filename_prefix="never/")

    def interrupting(node: str) -> tuple[Callable[[dict[str, Any]], None], list[int]]:
        pressed: list[int] = []

        def press(event: dict[str, Any]) -> None:
            data = event.get("data", {})
            if event["type"] == "progress" and data.get("node") == node and data["value"] > 0.2 * data["max"] and not pressed:
                pressed.append(data["value"])
                server.post("/interrupt", {})

        return press, pressed

    press, pressed = interrupting(made)
    run = server.run(graph.prompt, on_event=press)
    assert run.error["type"] == "execution_interrupted"
    assert pressed
    assert not (files(server) / "never").exists()
    assert same(draw(server, "a star", batch=2, seed=1), stock)

    scene = Scene("{}")
    samples = scene.sample(scene.unet, scene.text(scene.model[1], "a star")[0], scene.text(scene.model[1], "")[0], steps=400)
    scene.show(samples[0], scene.model[2])
    press, pressed = interrupting(samples)
    run = server.run(scene.prompt, on_event=press)
    assert run.error["type"] == "execution_interrupted"
    assert pressed
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    assert same(draw(server, "a star", batch=2), stock)


# --- bad input


def apply_only(server: Server, **inputs: Any) -> Run:
    scene = Scene("{}", **inputs) if "toggles" not in inputs else Scene(**inputs)
    scene.draw(scene.text(scene.model[1], "a star")[0], steps=1)
    return server.run(scene.prompt)


def concept_only(server: Server, kind: str, **inputs: Any) -> Run:
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    concepts = graph.add(kind, **inputs)
    made = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=concepts[0], objective="closed-form", nearby=0)
    graph.add("SepMESaveDeltas", deltas=made[0])
    return server.run(graph.prompt)


def train_only(server: Server, name: str = "star", save: dict[str, Any] | None = None, **inputs: Any) -> Run:
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    concepts = graph.add("SepMEConcept", name=name)
    given = {"model": model[0], "clip": model[1], "concepts": concepts[0], "objective": "closed-form", "nearby": 0} | inputs
    made = graph.add("SepMETrain", **given)
    graph.add("SepMESaveDeltas", deltas=made[0], **(save or {}))
    return server.run(graph.prompt)


def load_only(server: Server, delta: str, content_hash: str = "", workflow: dict[str, Any] | None = None, twice: bool = False) -> Run:
    scene = Scene()
    loaded = scene.add("SepMELoadDelta", delta=delta, content_hash=content_hash)
    if twice:
        loaded = scene.add("SepMELoadDelta", delta=delta, deltas=loaded[0])
    scene.unet = scene.add("SepMEApply", model=scene.model[0], deltas=loaded[0])[0]
    scene.draw(scene.text(scene.model[1], "a star")[0], steps=1)
    return server.run(scene.prompt, workflow)


def prompt_only(server: Server, text: str, toggles: str = "{}") -> Run:
    scene = Scene("{}")
    scene.draw(scene.add("SepMETextEncode", clip=scene.model[1], text=text, toggles=toggles)[0], steps=1)
    return server.run(scene.prompt)


def checkpoint_only(server: Server) -> Run:
    (server.base / "models/checkpoints/junk.safetensors").write_bytes(b"junk" * 100)
    graph = Graph()
    graph.add("PreviewAny", source=graph.add("SepMELoadCheckpoint", ckpt_name="junk.safetensors")[3])
    return server.run(graph.prompt)


BAD: dict[str, tuple[Callable[[Server], Run], str]] = {
    "toggles no JSON": (lambda s: apply_only(s, toggles="{star"), "The toggles are not JSON"),
    "toggles a list": (lambda s: apply_only(s, toggles="[1]"), "must be one JSON object"),
    "toggle of an unknown concept": (
        lambda s: apply_only(s, toggles='{"moon": 1}'),
        "no concept 'moon' here; loaded concepts: star, openmoji",
    ),
    "strength no number": (lambda s: apply_only(s, toggles='{"star": "much"}'), "is no number"),
    "unknown backend": (lambda s: apply_only(s, backend="fast"), "fast"),
    "tag of an unknown concept": (lambda s: prompt_only(s, "a star <erase:moon>"), "no concept 'moon' here"),
    "tag without a name": (lambda s: prompt_only(s, "a star <erase:>"), "names no concept"),
    "tag with a bad strength": (lambda s: prompt_only(s, "<erase:star:lots>"), "is no number"),
    "prompt toggles no JSON": (lambda s: prompt_only(s, "a star", "star"), "The toggles are not JSON"),
    "concept without a name": (lambda s: concept_only(s, "SepMEConcept", name="  "), "empty name"),
    "concept name with a tag": (lambda s: concept_only(s, "SepMEConcept", name="<b>"), "characters < > :"),
    "book no YAML": (lambda s: concept_only(s, "SepMEConceptBook", book="a: [b"), "not readable YAML"),
    "book with code": (lambda s: concept_only(s, "SepMEConceptBook", book="!!python/object/apply:os.system [x]"), "not readable YAML"),
    "book that names a file": (
        lambda s: concept_only(s, "SepMEConceptBook", book='{"concepts": ["x"], "preserve_file": "/etc/passwd"}'),
        "cannot name a preserve_file",
    ),
    "erase an unknown name": (lambda s: train_only(s, erase="moon"), "no concept 'moon' here"),
    "erase nothing": (lambda s: train_only(s, erase=" , "), "Nothing is to be erased"),
    "preserve what is erased": (lambda s: train_only(s, preserve="a star"), "also belongs to the preserve list"),
    "size that the model cannot draw": (lambda s: train_only(s, size=72), "multiples of 32 pixels"),
    "prefix out of the folder": (lambda s: train_only(s, save={"filename_prefix": "../../x"}), "leads out of"),
    "prefix from the root": (lambda s: train_only(s, save={"filename_prefix": "/tmp/x"}), "leads out of"),
    "prefix too long": (lambda s: train_only(s, save={"filename_prefix": "x" * 300}), "has more than 220 bytes"),
    "checkpoint that is none": (checkpoint_only, "is no safetensors file or is cut short"),
    "no delta": (lambda s: load_only(s, ""), "No delta is chosen"),
    "missing delta": (lambda s: load_only(s, "moon.safetensors"), "is not in models/sepme. Put its file there"),
    "delta out of the folder": (lambda s: load_only(s, "../checkpoints/x.safetensors"), "is not in models/sepme"),
    "delta twice": (lambda s: load_only(s, "star.safetensors", twice=True), "is loaded twice"),
    "wrong hash": (lambda s: load_only(s, "star.safetensors", "0" * 64), "star.safetensors is there, but holds another one"),
    "broken delta": (lambda s: load_only(s, "bad/broken.safetensors"), "get it again"),
    "a delta of another model": (lambda s: load_only(s, "bad/foreign.safetensors"), "train the concept on this model"),
}


@pytest.fixture(scope="session")
def bad_files(server: Server, trained: Run) -> None:
    """A delta whose tensors are cut short, and one of a model with other shapes."""
    folder = files(server) / "bad"
    folder.mkdir()
    data = bytearray((files(server) / "star.safetensors").read_bytes())
    data[-100] ^= 0xFF
    (folder / "broken.safetensors").write_bytes(data)
    star = ConceptDelta.load(files(server) / "star.safetensors")
    names = [n for n in star.up if n.startswith("middle")]
    foreign = ConceptDelta(star.concept, star.down, {n: star.up[n] for n in names}, {n: star.scale[n] for n in names}, star.gate, star.info)
    foreign.save(folder / "foreign.safetensors")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_node_error(server: Server, trained: Run, bad_files: None, case: str) -> None:
    queue, expected = BAD[case]
    run = queue(server)
    assert run.error is not None
    assert expected in (run.message if "exception_message" in run.error else json.dumps(run.error))
    assert "exception_message" not in run.error or len(run.message) < 600


def test_the_server_lives_on(server: Server, trained: Run) -> None:
    """After all of that the next prompt is right, and nothing but what was asked for lies in the folders."""
    assert accuracy(draw(server, "a star", batch=4, size=128), "star") >= 0.75
    assert accuracy(draw(server, "a star", "{}", batch=4, size=128), "star") <= 0.5
    assert not list(files(server).rglob("*.part"))
    assert not list(server.base.glob("x*"))


# --- sharing


def test_found_by_hash_when_renamed(server: Server, trained: Run) -> None:
    content_hash = ConceptDelta.load(files(server) / "star.safetensors").content_hash()
    moved = files(server) / "moved" / "other name.safetensors"
    moved.parent.mkdir()
    (files(server) / "star.safetensors").rename(moved)
    for copy in ("later/star.safetensors",):
        (files(server) / copy).unlink(missing_ok=True)
    try:
        assert load_only(server, "star.safetensors", content_hash).message == ""
        assert load_only(server, "moved\\other name.safetensors").message == ""
        assert load_only(server, "moved/other name.safetensors", content_hash.upper()).message == ""
        assert "is not in models/sepme" in load_only(server, "star.safetensors").message
    finally:
        moved.rename(files(server) / "star.safetensors")


def test_a_changed_file_is_read_again(server: Server, trained: Run) -> None:
    path = files(server) / "changing.safetensors"
    shutil.copy(files(server) / "star.safetensors", path)
    first = load_only(server, "changing.safetensors")
    assert first.error is None
    shutil.copy(files(server) / "openmoji.safetensors", path)
    assert "SepMELoadDelta0" in load_only(server, "changing.safetensors").executed
    path.unlink()
    assert "is not in models/sepme" in load_only(server, "changing.safetensors").message


def test_workflow_carries_recipe_and_delta(server: Server, trained: Run) -> None:
    """Saved with embed, a PNG is all that another person needs; without, the error says how to make the delta again."""
    content_hash = ConceptDelta.load(files(server) / "star.safetensors").content_hash()

    def picture(embed: bool) -> dict[str, Any]:
        scene = Scene()
        loaded = scene.add("SepMELoadDelta", delta="star.safetensors")
        stored = scene.add("SepMESaveDeltas", deltas=loaded[0], embed=embed, filename_prefix="shared/")
        unet = scene.add("SepMEApply", model=scene.model[0], deltas=stored[0])
        samples = scene.sample(unet[0], scene.text(scene.model[1], "a star")[0], scene.text(scene.model[1], "")[0], seed=50 + embed)
        saved = scene.add("SaveImage", images=scene.add("VAEDecode", samples=samples[0], vae=scene.model[2]), filename_prefix="shared")
        run = server.run(scene.prompt, {"nodes": [], "extra": {"ds": 1}})
        assert run.error is None, run.error
        assert content_hash in run.outputs[stored]["sepme"][0]
        png = Image.open(io.BytesIO(server.view(run.outputs[saved]["images"][0])))
        workflow: dict[str, Any] = json.loads(png.info["workflow"])
        return workflow

    embedded, plain = picture(True), picture(False)
    before = {p: p.read_bytes() for p in files(server).rglob("*.safetensors")}
    for path in before:
        path.unlink()
    try:
        assert load_only(server, "star.safetensors", content_hash, embedded).message == ""
        assert load_only(server, "shared/star.safetensors", "", embedded).message == ""
        message = load_only(server, "star.safetensors", content_hash, plain).message
        for part in ("The delta of 'star'", content_hash, "a picture of a star", "SepME Train", "objective gcirs", "seed 3"):
            assert part in message
        record = embedded["extra"]["sepme"][content_hash]
        data = bytearray(base64.b64decode(record["data"]))
        data[-50] ^= 1
        record["data"] = base64.b64encode(data).decode()
        assert "the delta inside the workflow" in load_only(server, "x.safetensors", content_hash, embedded).message
        record["data"] = "no base64!"
        assert "is damaged" in load_only(server, "y.safetensors", content_hash, embedded).message
        for nonsense in ({"extra": []}, {"extra": {"sepme": 3}}, {"extra": {"sepme": {content_hash: 1}}}, {"extra": None}):
            assert "is not in models/sepme" in load_only(server, f"{id(nonsense)}.safetensors", content_hash, nonsense).message
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_a_bare_prompts_history_holds_the_delta(server: Server, trained: Run) -> None:
    """Recipe and file, for programs that queue prompts in API format and have no workflow."""
    for embed in (False, True):
        graph = Graph()
        loaded = graph.add("SepMELoadDelta", delta="star.safetensors")
        saved = graph.add("SepMESaveDeltas", deltas=loaded[0], embed=embed)
        ((content_hash, record),) = server.run(graph.prompt).outputs[saved]["sepme"][0].items()
        assert record["concept"] == "star"
        assert content_hash == ConceptDelta.load(files(server) / "star.safetensors").content_hash()
        assert ("data" in record) is embed
    assert base64.b64decode(record["data"]) == (files(server) / "star.safetensors").read_bytes()


def test_export(server: Server, trained: Run) -> None:
    """A LoRA for core's LoraLoader that does what the delta does with the gate off; a copy as a delta file."""
    scene = Scene()
    star = scene.add("SepMELoadDelta", delta="star.safetensors")
    both = scene.add("SepMELoadDelta", delta="openmoji.safetensors", deltas=star[0])
    for form in ("lora", "delta"):
        scene.add("SepMEExport", deltas=both[0], format=form, filename_prefix="out/")
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    path = server.base / "models/loras/out/star-openmoji-lora.safetensors"
    assert run.outputs["SepMEExport0"]["text"] == [str(path)]
    assert (files(server) / "out/star.safetensors").read_bytes() == (files(server) / "star.safetensors").read_bytes()

    scene = Scene()
    lora = scene.add(
        "LoraLoader", model=scene.model[0], clip=scene.model[1], lora_name="out/star-openmoji-lora.safetensors", strength_model=1.0,
        strength_clip=1.0,
    )  # fmt: skip
    scene.unet = lora[0]
    shown = scene.draw(scene.text(scene.model[1], "an openmoji star")[0], batch=4)
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    expected = draw(server, "an openmoji star", "{}", {"gate": False}, batch=4)
    stock = draw(server, "an openmoji star", batch=4)
    difference = np.abs(np.stack(run.images[shown]).astype(int) - np.stack(expected))
    assert np.abs(np.stack(stock).astype(int) - np.stack(expected)).mean() > 20 * max(difference.mean(), 0.05)
    assert server.run(scene.prompt).error is None


def test_verify(server: Server, trained: Run) -> None:
    scene = Scene()
    star = scene.add("SepMELoadDelta", delta="star.safetensors")
    both = scene.add("SepMELoadDelta", delta="openmoji.safetensors", deltas=star[0])
    verified = scene.add("SepMEVerify", clip=scene.model[1], deltas=both[0])
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    text = run.outputs[verified]["text"][0]
    assert "star: holds" in text
    assert "openmoji: holds" in text
    image = run.images[verified][0]
    assert (image[..., 0].astype(int) - image[..., 1] > 60).mean() > 0.05  # the touched diagonal is red


# --- the host


def test_a_thousand_files_are_listed_and_searched(server: Server, trained: Run) -> None:
    folder = files(server) / "many"
    folder.mkdir()
    data = (files(server) / "star.safetensors").read_bytes()
    for i in range(1000):
        (folder / f"{i}.safetensors").write_bytes(data)
    try:
        info = server.get("/object_info/SepMELoadDelta")
        assert len(info["SepMELoadDelta"]["input"]["required"]["delta"][1]["options"]) >= 1000
        assert load_only(server, "nothing.safetensors", "1" * 64).error is not None  # looks at all of them
    finally:
        shutil.rmtree(folder)


def test_metadata_is_served(server: Server, trained: Run) -> None:
    """ComfyUI's own routes know the folder."""
    assert any("star.safetensors" in str(name) for name in server.get("/models/sepme"))
    assert server.get("/view_metadata/sepme?filename=star.safetensors")["concept"] == "star"


# --- examples and help

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


SHOWN = {  # example, title of a preview: what its pictures show, and what they do not
    ("1", "Stock"): {"rocket": True},
    ("1", "Rocket erased"): {"rocket": False},
    ("3", "Nothing erased"): {"rocket": True, "openmoji": True},
    ("3", "Rocket erased"): {"rocket": False, "openmoji": True},
    ("3", "Openmoji erased"): {"rocket": True, "openmoji": False},
    ("3", "Rocket, half of openmoji"): {"rocket": False},
    ("5", "a rocket"): {"rocket": False},
    ("5", "a church"): {"church": False},
    ("5", "an airplane"): {"airplane": True},
}


@pytest.mark.parametrize("path", [p for p in EXAMPLES if "checkpoint" not in p.name], ids=lambda p: p.stem)
def test_examples(server: Server, path: Path) -> None:
    """Each runs as it is; its pictures differ, and a classifier reads in them what the titles say."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    run = server.run(from_workflow(workflow, server.get("/object_info")))
    assert run.error is None, run.error
    pictures = {(path.name[0], n["title"]): run.images[str(n["id"])] for n in workflow["nodes"] if n["type"] == "PreviewImage"}
    assert {key for key in SHOWN if key[0] == path.name[0]} <= set(pictures)
    for i, (key, images) in enumerate(pictures.items()):
        assert not any(same(images, other) for other in list(pictures.values())[:i])
        found = {name: accuracy(images, name) for name in SHOWN.get(key, {})}
        assert found == {name: float(there) for name, there in SHOWN.get(key, {}).items()}, key


def test_examples_are_among_the_templates(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")["comfyui-sepme"]) == [p.stem for p in EXAMPLES]
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize("name", INTERFACE)
def test_every_node_has_a_help_page(server: Server, name: str) -> None:
    """Where the front end looks for it; every input and output is explained."""
    text = server.get(f"/extensions/comfyui-sepme/docs/{name}.md").decode()
    required, optional, _ = INTERFACE[name]
    for given in (*required, *optional):
        assert re.search(rf"^\| (.*, )?{given}(,.*)? \|", text, re.MULTILINE), given
