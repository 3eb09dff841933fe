"""Workflows on a real server, over HTTP and websocket, as a browser queues them."""

from __future__ import annotations

import pytest
from comfyui.graph import Graph
from comfyui.server import Server

pytestmark = pytest.mark.xdist_group("comfyui")

# The public interface: required and optional inputs, outputs. Workflows of users depend on it.
INTERFACE = {
    "SepMEDemoModel": ([], [], ["MODEL", "CLIP", "VAE"]),
    "SepMELoadCheckpoint": (["ckpt_name"], [], ["MODEL", "CLIP", "VAE", "STRING"]),
    "SepMEConcept": (["name"], ["prompts", "anchor", "concepts"], ["CONCEPTS"]),
    "SepMEConceptBook": (["book"], ["concepts"], ["CONCEPTS"]),
    "SepMETrain": (
        ["model", "clip", "concepts"],
        ["erase", "preserve", "objective", "mode", "steps", "learning_rate", "seed", "max_rank", "deltas", "size"],
        ["DELTAS", "LOSS_MAP", "STRING"],
    ),
    "SepMESaveDeltas": (["deltas"], ["filename_prefix", "embed"], ["DELTAS"]),
    "SepMELoadDelta": (["delta"], ["content_hash", "deltas"], ["DELTAS"]),
    "SepMEApply": (["model", "deltas"], ["toggles", "backend", "gate"], ["MODEL"]),
    "SepMETextEncode": (["clip", "text"], ["toggles"], ["CONDITIONING", "STRING"]),
    "SepMEConditioningToggles": (["conditioning", "toggles"], [], ["CONDITIONING"]),
    "SepMEVerify": (["clip", "deltas"], [], ["STRING", "IMAGE"]),
    "SepMEExport": (["deltas"], ["format", "filename_prefix"], []),
}


def test_interface(server: Server) -> None:
    info = {name: node for name, node in server.get("/object_info").items() if name.startswith("SepME")}
    assert set(info) == set(INTERFACE)
    for name, (required, optional, outputs) in INTERFACE.items():
        order = info[name]["input_order"]
        assert (order.get("required", []), order.get("optional", []), info[name]["output"]) == (required, optional, outputs)


def test_train_save_apply_sample(server: Server) -> None:
    graph = Graph()
    model = graph.add("SepMEDemoModel")
    concepts = graph.add("SepMEConcept", name="star", prompts="a star\na red star\na plain star")
    trained = graph.add("SepMETrain", model=model[0], clip=model[1], concepts=concepts[0])
    saved = graph.add("SepMESaveDeltas", deltas=trained[0])
    applied = graph.add("SepMEApply", model=model[0], deltas=saved[0])
    samples = graph.sample(applied[0], graph.text(model[1], "a star")[0], graph.text(model[1], "")[0], batch=2)
    shown = graph.show(samples[0], model[2])
    run = server.run(graph.prompt)
    assert run.error is None
    assert len(run.images[shown]) == 2
