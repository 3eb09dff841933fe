"""A checkpoint in SD1.5's layout, on a server that has neither triton nor diffusers, with the pack as the registry's zip holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui.conftest import NAME
from comfyui.graph import Graph, Node, from_workflow
from comfyui.server import ROOT, Server

from sepme.delta.concept_delta import ConceptDelta

pytestmark = pytest.mark.xdist_group("comfyui inside")


class Scene(Graph):
    def __init__(self) -> None:
        super().__init__()
        self.model = self.add("CheckpointLoaderSimple", ckpt_name=NAME)
        self.unet = self.model[0]

    def draw(self, text: str) -> Node:
        prompt = self.add("SepMETextEncode", clip=self.model[1], text=text)
        samples = self.sample(self.unet, prompt[0], self.text(self.model[1], "blurry")[0], batch=2, steps=3)
        return self.show(samples[0], self.model[2])


def ok(server: Server, graph: Graph) -> Any:
    run = server.run(graph.prompt)
    assert run.error is None, run.error
    return run


def test_from_training_to_pictures(checkpoint_server: Server) -> None:
    """The example for one's own checkpoint trains and saves; then the file is loaded, applied, switched and exported."""
    server = checkpoint_server
    info = server.get("/object_info")
    assert info["SepMELoadDelta"]["input"]["required"]["delta"][1]["options"] == []
    assert not (server.base / "models" / "sepme").exists()
    (example,) = (ROOT / "example_workflows").glob("2_*.json")
    prompt = from_workflow(json.loads(example.read_text(encoding="utf-8")), info)
    for node in prompt.values():
        if node["class_type"] == "SepMELoadCheckpoint":
            node["inputs"]["ckpt_name"] = NAME
        if node["class_type"] == "SepMETrain":
            node["inputs"] |= {"steps": 4, "batch": 1, "size": 64, "nearby": 0}
    run = server.run(prompt)
    assert run.error is None, run.error
    told = [t for o in run.outputs.values() for t in o.get("text", [])]
    assert any("architecture: sd15" in t for t in told)
    assert any("van gogh: 4 steps" in t for t in told)
    delta = ConceptDelta.load(server.base / "models" / "sepme" / "van-gogh.safetensors")
    assert delta.architecture == "sd15"
    assert {c["name"] for c in delta.info["known"]} == {"picasso", "claude monet"}

    stock, erased = Scene(), Scene()
    loaded = erased.add("SepMELoadDelta", delta="van-gogh.safetensors", content_hash=delta.content_hash())
    erased.unet = erased.add("SepMEApply", model=erased.model[0], deltas=loaded[0])[0]
    texts = {"touched": "a house in the style of van gogh", "kept": "a house in the style of van gogh <keep:van gogh>", "other": "picasso"}
    shown = {name: (erased.draw(text), stock.draw(text.split(" <")[0])) for name, text in texts.items()}
    info_node = stock.add("SepMELoadCheckpoint", ckpt_name=NAME)
    said = stock.add("PreviewAny", source=info_node[3])
    lora = erased.add("SepMEExport", deltas=loaded[0], format="lora")
    after, before = ok(server, erased), ok(server, stock)
    same = {n: np.array_equal(np.stack(after.images[e]), np.stack(before.images[s])) for n, (e, s) in shown.items()}
    assert same == {"touched": False, "kept": True, "other": True}
    assert "van gogh (van-gogh.safetensors)" in before.outputs[said]["text"][0]
    assert "other weights" not in before.outputs[said]["text"][0]

    merged, ungated = Scene(), Scene()
    name = Path(after.outputs[lora]["text"][0]).name
    merged.unet = merged.add(
        "LoraLoader", model=merged.model[0], clip=merged.model[1], lora_name=name, strength_model=1.0, strength_clip=1.0
    )[0]  # fmt: skip
    loaded = ungated.add("SepMELoadDelta", delta="van-gogh.safetensors")
    ungated.unet = ungated.add("SepMEApply", model=ungated.model[0], deltas=loaded[0], gate=False)[0]
    a, b = merged.draw(texts["touched"]), ungated.draw(texts["touched"])
    pictures = [np.stack(ok(server, graph).images[node]).astype(int) for graph, node in ((merged, a), (ungated, b))]
    change = np.abs(np.stack(before.images[shown["touched"][1]]) - pictures[1]).mean()
    assert change > 0
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.1 * change


def test_quick_erase(checkpoint_server: Server) -> None:
    """The first example: a checkpoint and a name; the pair differs, other prompts do not, and the next run plans nothing."""
    server = checkpoint_server
    (example,) = (ROOT / "example_workflows").glob("0_*.json")
    workflow = json.loads(example.read_text(encoding="utf-8"))
    prompt = from_workflow(workflow, server.get("/object_info"))
    assert sum(node["class_type"].startswith("SepME") for node in prompt.values()) <= 4
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    kinds["CheckpointLoaderSimple"]["ckpt_name"] = NAME
    kinds["EmptyLatentImage"] |= {"width": 64, "height": 64}
    kinds["SepMECompare"]["steps"] = 3
    (compare,) = (node for node, inputs in prompt.items() if inputs["class_type"] == "SepMECompare")
    assert "No concept is named" in server.run(prompt).message
    kinds["SepMEErase"]["concepts"] = "van gogh"

    def pair() -> list[bytes]:
        run = server.run(prompt)
        assert run.error is None, run.error
        return [server.view(run.outputs[compare]["sepme_compare"][0][name][0]) for name in ("before", "after")]

    before, after = pair()
    assert before != after
    assert len(list((server.base / "models" / "sepme" / ".cache").glob("*.json"))) == 1
    next(node for node in prompt.values() if node["inputs"].get("text", "").startswith("a village"))["inputs"]["text"] = "picasso"
    before, after = pair()
    assert before == after


def test_pickles_are_refused(checkpoint_server: Server) -> None:
    server = checkpoint_server
    (server.base / "models" / "checkpoints" / "old.ckpt").write_bytes(b"no model")
    graph = Graph()
    model = graph.add("SepMELoadCheckpoint", ckpt_name="old.ckpt")
    graph.add("PreviewAny", source=model[3])
    assert "is a pickle by its name" in server.run(graph.prompt).message


def test_the_demo_runs_without_diffusers(checkpoint_server: Server) -> None:
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    shown = graph.show(graph.sample(model[0], graph.text(model[1], "a star")[0], graph.text(model[1], "")[0])[0], model[2])
    assert ok(checkpoint_server, graph).images[shown][0].shape == (64, 64, 3)
