"""What people and programs put into the nodes: names with commas, signs or devices, dates in prefixes, clip skip, numbers that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from comfyui.graph import Graph, Node
from comfyui.inside import Inside
from comfyui.server import Run, Server

from sepme.delta.concept_delta import ConceptDelta

pytestmark = pytest.mark.xdist_group("comfyui")


class Scene(Graph):
    """The demo model and some concepts, erased in closed form."""

    def __init__(self, names: tuple[str, ...] = ("star",), skip: int = 0, **options: Any) -> None:
        super().__init__()
        self.model = self.add("SepMEDemoModel")
        self.clip = self.model[1] if not skip else self.add("CLIPSetLastLayer", clip=self.model[1], stop_at_clip_layer=skip)[0]
        link = {}
        for name in names:
            link = {"concepts": self.add("SepMEConcept", name=name, anchor="a church", **link)[0]}
        chosen = {"objective": "closed-form", "nearby": 0} | link | options
        self.made = self.add("SepMETrain", model=self.model[0], clip=self.clip, **chosen)

    def saved(self, **options: Any) -> Node:
        return self.add("SepMESaveDeltas", deltas=self.made[0], **options)

    def draw(self, positive: Any, unet: Any, clip: Any = None) -> Node:
        return self.show(self.sample(unet, positive, self.text(clip or self.model[1], "")[0], steps=2)[0], self.model[2])


def made(run: Run) -> list[str]:
    assert run.error is None, run.error
    return [record["concept"] for record in run.outputs["SepMESaveDeltas0"]["sepme"][0].values()]


def paths(run: Run) -> list[Path]:
    assert run.error is None, run.error
    return [Path(line.split(": ", 1)[1]) for line in run.outputs["SepMESaveDeltas0"]["text"][0].splitlines()]


@pytest.mark.parametrize(
    ("erase", "expected"),
    [
        ("Cruise, Tom", ["Cruise, Tom"]),
        ('"Cruise, Tom", 1+1', ["Cruise, Tom", "1+1"]),
        ("1+1\ncruise,  tom\n", ["1+1", "Cruise, Tom"]),
        ('1+1, "say ""hi"""', ["1+1", 'say "hi"']),
        ("*", ["Cruise, Tom", "1+1", 'say "hi"']),
    ],
)
def test_names_with_commas_plus_and_quotes(server: Server, erase: str, expected: list[str]) -> None:
    scene = Scene(("Cruise, Tom", "1+1", 'say "hi"'), erase=erase)
    scene.saved(filename_prefix="commas/")
    assert sorted(made(server.run(scene.prompt))) == sorted(expected)


def test_names_that_give_one_file_name(server: Server) -> None:
    """Signs, emoji, accents, devices: every concept has a file of its own, the same again the next time, and the page can rename it."""
    names = ("C++", "C#", "🐱", "🐶", "कि", "की", "star+", "star#", "con", "nul.x", "LPT1")
    written = {}
    for _ in range(2):
        scene = Scene(names)
        scene.saved(filename_prefix="names/")
        files = paths(server.run(scene.prompt))
        assert len({f.name.casefold() for f in files}) == len(names)
        assert [ConceptDelta.load(f).concept.name for f in files] == list(names)
        assert written in ({}, {f: f.read_bytes() for f in files})
        written = {f: f.read_bytes() for f in files}
        server.post("/free", {"unload_models": True, "free_memory": True})
    for i, file in enumerate(written):
        answer = server.post("/sepme/deltas/rename", {"from": f"names/{file.name}", "to": f"names/renamed-{i}.safetensors"})
        assert answer["name"] == f"names/renamed-{i}.safetensors"


@pytest.mark.parametrize(
    ("prefix", "pattern"),
    [
        ("%date:yyyy-MM-dd%/x-", r"20\d\d-[01]\d-[0-3]\d/x-star"),
        ("%date:yy.M.d-hhmmss%-", r"\d\d\.\d+\.\d+-\d{6}-star"),
        ("%year%%month%%day%/%hour%.%minute%.%second%-", r"20\d{6}/\d\d\.\d\d\.\d\d-star"),
        ("100%", "100%star"),
        ("50% of 100% ", "50% of 100% star"),
    ],
)
def test_dates_in_prefixes(server: Server, prefix: str, pattern: str) -> None:
    scene = Scene()
    scene.saved(filename_prefix=f"dates/{prefix}")
    (path,) = paths(server.run(scene.prompt))
    assert re.fullmatch(rf"dates/{pattern}\.safetensors", path.relative_to(server.base / "models" / "sepme").as_posix())


BAD_PREFIXES = {
    "%KSampler.seed%": "'%KSampler.seed%', which cannot be filled in here",
    "%width%": "'%width%', which cannot be filled in",
    "con/": "No file on Windows can be called 'con'",
    "a:b": "No file on Windows",
    "%date:hh:mm%": "No file on Windows",
    "a*": "No file on Windows",
    "../": "leads out of",
}


@pytest.mark.parametrize("prefix", BAD_PREFIXES)
@pytest.mark.parametrize("kind", ["SepMESaveDeltas", "delta", "lora"])
def test_bad_prefixes(server: Server, prefix: str, kind: str) -> None:
    before = {p for p in server.base.rglob("*") if p.suffix == ".safetensors"}
    scene = Scene()
    options = {} if kind == "SepMESaveDeltas" else {"format": kind}
    node = scene.add("SepMESaveDeltas" if not options else "SepMEExport", deltas=scene.made[0], filename_prefix=prefix, **options)
    run = server.run(scene.prompt)
    assert run.error["node_id"] == str(node)
    assert BAD_PREFIXES[prefix] in run.message
    assert before == {p for p in server.base.rglob("*") if p.suffix == ".safetensors"}


# --- clip skip


def test_clip_skip_is_recorded_and_a_difference_is_said(server: Server) -> None:
    def queue(train: int, read: int, tag: str, save: bool = False) -> tuple[Run, list[str]]:
        scene = Scene(skip=train)
        deltas = scene.saved(filename_prefix=f"skip{train}/")[0] if save else scene.made[0]
        unet = scene.add("SepMEApply", model=scene.model[0], deltas=deltas)
        clip = scene.model[1] if not read else scene.add("CLIPSetLastLayer", clip=scene.model[1], stop_at_clip_layer=read)[0]
        scene.draw(scene.text(clip, f"a star{tag}")[0], unet[0], clip)
        run = server.run(scene.prompt)
        assert run.error is None, run.error
        return run, [e["data"]["text"] for e in run.events if e["type"] == "sepme.notice"]

    run, notices = queue(-2, -2, "", save=True)
    assert notices == []
    (path,) = [Path(text.split(": ", 1)[1]) for text in run.outputs["SepMESaveDeltas0"]["text"]]
    assert ConceptDelta.load(path).info["clip_skip"] == 1
    for tag in ("", " <erase:star>"):
        assert queue(0, 0, tag)[1] == queue(-1, 0, tag)[1] == queue(0, -1, tag)[1] == []
        (text,) = queue(0, -2, tag)[1]
        assert "'star' was made with 0 of CLIP's last layers skipped, here 1 are" in text
    scene = Scene()
    loaded = scene.add("SepMELoadDelta", delta="skip-2/star.safetensors")
    unet = scene.add("SepMEApply", model=scene.model[0], deltas=loaded[0])
    scene.draw(scene.text(scene.model[1], "a star")[0], unet[0])
    (text,) = [e["data"]["text"] for e in server.run(scene.prompt).events if e["type"] == "sepme.notice"]
    assert "'star' was made with 1 of CLIP's last layers skipped, here 0 are" in text


@pytest.mark.parametrize(("layer", "skipped"), [(None, 0), (-1, 0), (-2, 1), (-24, 0)])
def test_clip_skip_of_a_clip(inside: Inside, layer: int | None, skipped: int) -> None:
    clip = inside.clip.clone()
    clip.clip_layer(layer)
    assert inside.host.clip_skip(clip) == skipped


# --- what programs send in API format

NONSENSE: list[Any] = [None, "nan", float("nan"), 1e308, -1, 10**30, [1, 2], {}, "é" * 3000, "\ud800"]
KINDS = {  # node: its inputs that are typed in
    "SepMEErase": ("concepts", "preserve"),
    "SepMEApply": ("toggles", "backend", "gate"),
    "SepMETextEncode": ("text", "toggles"),
    "SepMEConditioningToggles": ("toggles",),
    "SepMEConcept": ("name", "prompts", "anchor"),
    "SepMEConceptBook": ("book",),
    "SepMETrain": ("erase", "preserve", "objective", "mode", "steps", "learning_rate", "seed", "max_rank", "size", "edit"),
    "SepMESaveDeltas": ("filename_prefix", "embed"),
    "SepMELoadDelta": ("delta", "content_hash"),
    "SepMEExport": ("format", "filename_prefix"),
    "SepMELoadCheckpoint": ("ckpt_name",),
    "SepMECompare": ("strengths",),
}


def everything(kind: str) -> Graph:
    """A prompt in which a kind of node runs, with as little as possible beside it."""
    if kind == "SepMELoadCheckpoint":
        graph = Graph()
        graph.add("PreviewAny", source=graph.add(kind, ckpt_name="none.safetensors")[3])
        return graph
    if kind == "SepMEConceptBook":
        graph = Graph()
        graph.add("PreviewAny", source=graph.add(kind, book="[moon]")[0])
        return graph
    scene = Scene()
    if kind == "SepMEErase":
        unet = scene.add(kind, model=scene.model[0], clip=scene.model[1], concepts="star")
        scene.draw(scene.text(scene.model[1], "a star")[0], unet[0])
        return scene
    if kind == "SepMECompare":
        unet = scene.add("SepMEApply", model=scene.model[0], deltas=scene.made[0])
        text = scene.text(scene.model[1], "a star")
        latent = scene.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        sides = {"model": unet[0], "positive": text[0], "negative": text[0], "latent_image": latent[0], "vae": scene.model[2]}
        scene.add("PreviewImage", images=scene.add(kind, **sides, steps=1)[2])
        return scene
    saved = scene.saved(filename_prefix="nonsense/")
    if kind in ("SepMEExport", "SepMELoadDelta"):
        del scene.prompt[saved]
        loaded = scene.made if kind == "SepMEExport" else scene.add(kind, delta="nonsense/star.safetensors")
        scene.add("SepMEExport", deltas=loaded[0], filename_prefix="nonsense/")
    if kind in ("SepMEApply", "SepMETextEncode", "SepMEConditioningToggles"):
        unet = scene.add("SepMEApply", model=scene.model[0], deltas=scene.made[0])
        text = scene.add("SepMETextEncode", clip=scene.model[1], text="a star")
        scene.draw(scene.add("SepMEConditioningToggles", conditioning=text[0], toggles="{}")[0], unet[0])
    return scene


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_a_sentence(server: Server, kind: str) -> None:
    """Every typed input, given everything that JSON can hold: it runs, ComfyUI refuses it, or the error is one of our sentences."""
    wrong = []
    for name in KINDS[kind]:
        for value in NONSENSE:
            graph = everything(kind)
            graph.prompt[f"{kind}0"]["inputs"][name] = value
            run = server.run(graph.prompt)
            kinds = (run.error or {}).get("exception_type", "sepme.SepMEError")
            if kinds != "sepme.SepMEError" or "Traceback" in json.dumps(run.error):
                wrong.append((name, value, kinds, run.message[:300]))
    assert wrong == []


HALVES = ("star\ud800", '{"star\ud800": 1}', '{"star\\ud800": 1}', "a <erase:star\ud800>", '["star\\udc00"]')  # lone surrogates


def test_half_characters_in_every_text(server: Server) -> None:
    """A message that cannot be printed would end ComfyUI's queue; each of ours can, whatever input it quotes."""
    texts = {
        (kind, name)
        for kind, node in server.get("/object_info").items()
        for inputs in node["input"].values()
        for name, spec in inputs.items()
        if kind.startswith("SepME") and (isinstance(spec[0], list) or spec[0] in ("STRING", "COMBO"))
    }
    assert texts >= {("SepMEConcept", "name"), ("SepMELoadDelta", "content_hash"), ("SepMELoadCheckpoint", "ckpt_name")}
    for kind, name in sorted(texts):
        for value in HALVES:
            graph = everything(kind)
            graph.prompt[f"{kind}0"]["inputs"][name] = value
            run = server.run(graph.prompt)
            run.message.encode()
            assert (run.error or {}).get("exception_type", "sepme.SepMEError") == "sepme.SepMEError", (kind, name, value, run.message)
