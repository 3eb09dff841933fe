"""What becomes of a prompt when it is queued: tags in text nodes that are not ours, tags that mean nothing, erasures that get lost."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from comfyui.graph import Graph, Node
from comfyui.server import Run, Server

pytestmark = pytest.mark.xdist_group("comfyui")


class Scene(Graph):
    """The demo model with star and tulip erased in closed form."""

    def __init__(self, erase: str = "*", toggles: str = "{}") -> None:
        super().__init__()
        self.model = self.add("SepMEDemoModel")
        star = self.add("SepMEConcept", name="star", prompts="a star\na picture of a star", anchor="a church")
        tulip = self.add("SepMEConcept", name="tulip", prompts="a tulip\na picture of a tulip", anchor="a church", concepts=star[0])
        self.made = self.add(
            "SepMETrain", model=self.model[0], clip=self.model[1], concepts=tulip[0], objective="closed-form", erase=erase, nearby=0
        )  # fmt: skip
        self.applied = self.add("SepMEApply", model=self.model[0], deltas=self.made[0], toggles=toggles)

    def draw(self, positive: Any, model: Any = None) -> Node:
        negative = self.text(self.model[1], "")
        return self.show(self.sample(model or self.applied[0], positive, negative[0], steps=3)[0], self.model[2])


def sampled(server: Server, kind: str, text: Any, stock: bool = False, **more: Any) -> np.ndarray:
    scene = Scene()
    given = scene.add("PrimitiveStringMultiline", value=text)[0] if more.pop("linked", False) else text
    node = scene.add(kind, clip=scene.model[1], text=given, **more)
    shown = scene.draw(node[0], scene.model[0] if stock else None)
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    return run.images[shown][0]


def test_core_text_nodes_read_tags(server: Server) -> None:
    """Typed into the node or linked to it: the same picture, to the bit, as by SepME Text Encode."""
    stock, erased = sampled(server, "CLIPTextEncode", "a star", stock=True), sampled(server, "CLIPTextEncode", "a star")
    assert not np.array_equal(stock, erased)
    for linked in (False, True):
        assert np.array_equal(sampled(server, "CLIPTextEncode", "a star <keep:star>", linked=linked), stock)
        half = sampled(server, "CLIPTextEncode", "a star <erase:STAR:0.5>", linked=linked)
        assert np.array_equal(half, sampled(server, "SepMETextEncode", "a star <erase:star:0.5>"))
        assert not np.array_equal(half, stock)
        assert not np.array_equal(half, erased)


def test_a_tag_in_a_text_that_is_put_together(server: Server) -> None:
    scene = Scene()
    joined = scene.add("StringConcatenate", string_a="a star <keep:", string_b="star>", delimiter="")
    shown = scene.draw(scene.add("CLIPTextEncode", clip=scene.model[1], text=joined[0])[0])
    assert np.array_equal(server.run(scene.prompt).images[shown][0], sampled(server, "CLIPTextEncode", "a star", stock=True))


def test_without_our_toggles_a_prompt_is_left_alone(server: Server) -> None:
    """No SepME Apply, or none that the text has to do with: the words are the user's."""
    scene = Scene()
    text = scene.add("CLIPTextEncode", clip=scene.model[1], text="a star <keep your hands off")
    shown = scene.draw(text[0], scene.model[0])
    run = server.run(scene.prompt)
    assert run.error is None, run.error
    assert "CLIPTextEncode0" in run.executed
    assert run.images[shown]
    history = server.get(f"/history/{run.prompt_id}")[run.prompt_id]["prompt"][2]
    assert history[text]["class_type"] == "CLIPTextEncode"


TAGS = {  # text: what the error says
    "a star <keep:star:0.7:0.5>": "<keep:star:0.7:0.5>",
    "a star <erase:star:0.7:0.5>": "<erase:star:0.7:0.5>",
    "a star <keep:star": "<keep:star",
    "a star <keep star>": "<keep star>",
    "a star <erase:star:1:lbw=ALL>": "lbw=ALL",
    "a star ＜keep:star＞": "＜keep:star＞",
    "a star <keep：star>": "<keep：star>",
    "a star <erase:strar>": "no concept 'strar' here; loaded concepts: star, tulip",
    "a star <keep:moon.safetensors>": "no concept 'moon.safetensors' here",
}


@pytest.mark.parametrize("kind", ["SepMETextEncode", "CLIPTextEncode"])
@pytest.mark.parametrize("text", TAGS)
def test_a_bad_tag_is_an_error_of_its_own_node(server: Server, kind: str, text: str) -> None:
    scene = Scene()
    node = scene.add(kind, clip=scene.model[1], text=text)
    scene.draw(node[0])
    run = server.run(scene.prompt)
    assert run.error is not None
    assert TAGS[text] in run.message
    assert run.error["node_id"] == str(node)
    assert run.error["exception_type"] == "sepme.SepMEError"
    assert "KSampler0" not in run.executed


def test_an_unknown_toggle_is_an_error_of_its_own_node(server: Server) -> None:
    """Also when its node ran before, with other deltas, and comes from the cache otherwise."""

    def queue(erase: str, again: bool = False) -> Run:
        scene = Scene(erase)
        if not again:
            scene.prompt["SepMEConcept0"]["inputs"] |= {"name": "star"}
        else:
            scene.prompt["SepMEConcept0"]["inputs"] |= {"name": "a star"}
        text = scene.text(scene.model[1], "a star")
        scene.draw(scene.add("SepMEConditioningToggles", conditioning=text[0], toggles='{"star": 0}')[0])
        return server.run(scene.prompt)

    assert queue("*").error is None
    run = queue("*", again=True)
    assert run.error["node_id"] == "SepMEConditioningToggles0"
    assert "no concept 'star' here; loaded concepts: a star, tulip" in run.message
    assert queue("*").error is None


def test_a_tag_where_it_is_read_as_words(server: Server) -> None:
    """Another text node: an error that names it, at SepME Apply, although that one may be in the cache; not when its text is unused."""

    def queue(text: str, model: int = 0) -> tuple[Run, Scene]:
        scene = Scene()
        node = scene.add("CLIPTextEncodeLumina2", clip=scene.model[1], system_prompt="superior", user_prompt=text)
        scene.prompt[node]["_meta"] = {"title": "My prompt"}
        scene.draw(node[0], [scene.applied, scene.model][model][0])
        return server.run(scene.prompt), scene

    assert queue("a star")[0].error is None
    run, scene = queue("a star <keep:star>")
    assert run.error["node_id"] == str(scene.applied)
    assert "'My prompt' (node CLIPTextEncodeLumina20)" in run.message
    assert "SepME Conditioning Toggles" in run.message
    assert queue("a star <keep:star>", model=1)[0].error is None


def test_a_save_that_loses_the_erasure_is_said(server: Server) -> None:
    def notices(run: Run) -> dict[str, str]:
        return {e["data"]["node"]: e["data"]["text"] for e in run.events if e["type"] == "sepme.notice"}

    scene = Scene()
    scene.add("ModelSave", model=scene.applied[0], filename_prefix="erased")
    merged = scene.add("ModelMergeSimple", model1=scene.model[0], model2=scene.applied[0], ratio=0.5)
    other = scene.add("ModelMergeSimple", model1=scene.applied[0], model2=scene.model[0], ratio=0.5)
    scene.add("CheckpointSave", model=other[0], clip=scene.model[1], vae=scene.model[2], filename_prefix="merged")
    scene.draw(scene.text(scene.model[1], "a star")[0], merged[0])
    found = notices(server.run(scene.prompt))
    assert set(found) == {"ModelSave0", "ModelMergeSimple0", "CheckpointSave0"}
    assert "SepME Export" in found["ModelSave0"]
    assert "behind the merge" in found["ModelMergeSimple0"]
    scene = Scene()
    scene.add("ModelSave", model=scene.model[0], filename_prefix="stock")
    scene.draw(scene.text(scene.model[1], "a star")[0])
    assert notices(server.run(scene.prompt)) == {}


def test_what_a_cached_training_made_is_said_again(server: Server) -> None:
    """ComfyUI sends nothing of a cached node that is no output node; a page that was loaded again has to hear it."""

    def queue(erase: str) -> tuple[Run, Any]:
        scene = Scene(erase)
        scene.draw(scene.text(scene.model[1], "a star")[0])
        run = server.run(scene.prompt)
        assert run.error is None, run.error
        return run, [e["data"] for e in run.events if e["type"] == "sepme.made"]

    server.post("/free", {"unload_models": True, "free_memory": True})
    first, _ = queue("star, tulip")
    (told,) = [e["data"]["output"]["sepme_made"] for e in first.events if e["type"] == "executed" and e["data"]["node"] == "SepMETrain0"]
    again, made = queue("star, tulip")
    assert "SepMETrain0" not in again.executed
    assert made == [{"node": "SepMETrain0", "sepme_made": told}]
    assert [f["concept"] for f in told] == ["star", "tulip"]
    other, made = queue("tulip, star")
    assert "SepMETrain0" in other.executed
    assert made == []


@pytest.mark.parametrize(
    "prompt",
    [
        None, [], {"1": None}, {"1": {"class_type": "SepMEApply"}}, {"1": {"class_type": ["SepMEApply"], "inputs": {}}},
        {"1": {"class_type": "SepMEApply", "inputs": {"deltas": ["1", 0], "model": ["1", 7]}}},
        {"1": {"class_type": "SepMEApply", "inputs": {"deltas": ["2", -1]}}, "2": {"class_type": "no such", "inputs": {"x": ["1", 0]}}},
        {"1": {"class_type": "SepMEApply", "inputs": {"deltas": [[], {}], "model": ["1"]}, "_meta": 3}},
    ],
)  # fmt: skip
def test_nonsense_is_left_to_comfyui(server: Server, prompt: Any) -> None:
    log = server.log.stat().st_size
    with suppress(HTTPError):  # ComfyUI's own answer to some of these
        server.post("/prompt", {"prompt": prompt})
    with server.log.open("rb") as file:
        file.seek(log)
        assert b"on_prompt_handler" not in file.read()
