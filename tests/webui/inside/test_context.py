"""Edits of the context: on the conditioning, with no patch of the model where nothing else is on; beside per-layer deltas; what fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modules.paths
import modules.script_callbacks
import modules.shared
import modules.toy
import pytest
import torch

from .conftest import CONCEPTS, WebUI
from .test_erasing import hooks

CLOSE = {"rtol": 0, "atol": 2e-3}  # float16 factors, each rounded by itself


def train(ui: WebUI, folder: Path, edit: str) -> None:
    """Closed forms of all concepts for the checkpoint that is loaded."""
    modules.paths.models_path = str(folder)
    book = ui.part("sepme.concepts").ConceptBook.loads(f"concepts: [{', '.join(CONCEPTS)}]")
    host, made = ui.part("scripts.webui.host"), ui.part("sepme.train")
    with host.loaded_model() as model:
        planner = ui.planner(model, book)
        for name in CONCEPTS:
            options = made.TrainOptions.for_mode(objective="closed-form", edit=edit)
            host.library.save(made.make_delta(planner, name, model, options))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models folders by form; ``mixed`` has the star as an edit of the context, the others per layer."""
    folders = {form: tmp_path_factory.mktemp(form) for form in ("context", "layers", "mixed")}
    ui = WebUI("a1111", folders["context"])
    for form in ("context", "layers"):
        train(ui, folders[form], form)
    (folders["mixed"] / "sepme").mkdir()
    for name in CONCEPTS:
        source = folders["context" if name == "star" else "layers"] / "sepme" / f"{name}.safetensors"
        (folders["mixed"] / "sepme" / source.name).write_bytes(source.read_bytes())
    return folders


@pytest.fixture
def webui(kind: str, files: dict[str, Path]) -> Iterator[WebUI]:
    ui = WebUI(kind, files["context"])
    yield ui
    ui.part("scripts.webui.generation").release()


def use(ui: WebUI, folder: Path) -> None:
    modules.paths.models_path = str(folder)


def test_erased_restored_and_gated_without_a_patch(webui: Any, files: dict[str, Path]) -> None:
    stock = webui.draw(script=False)
    found: list[Any] = []

    def look(p: Any, step: int) -> None:
        found.extend(hooks(webui))
        if webui.kind == "forge":
            found.extend(webui.model.forge_objects.unet.object_patches)

    erased = webui.erase("star", on_step=look)
    assert found == []
    assert not torch.equal(erased, stock)
    assert torch.equal(webui.erase("star", strengths='{"star": 0}'), stock)
    assert torch.equal(webui.draw("a star <keep:star>", True, ["star"]), stock)
    assert torch.equal(webui.erase("star", "heart", prompt="a red house"), webui.draw("a red house", script=False))
    half = webui.erase("star", strengths='{"star": 0.5}')
    assert not webui.last.comments
    use(webui, files["layers"])
    torch.testing.assert_close(webui.erase("star"), erased, **CLOSE)
    torch.testing.assert_close(webui.erase("star", strengths='{"star": 0.5}'), half, **CLOSE)
    assert torch.equal(webui.draw(), stock)


@pytest.mark.parametrize("form", ["context", "mixed"])
@pytest.mark.parametrize(
    ("prompts", "more"),
    [
        (
            ["a star", "a star <erase:star>", "a heart <erase:heart>", "a star and a heart <erase:star:0.5> <erase:heart>"],
            {"batch_size": 4},
        ),
        (["a star AND a heart <erase:star>", "a star AND a house"], {"batch_size": 2}),
        (["[a star:a heart:2] <erase:star> <erase:heart>"], {"steps": 4}),
        (["a star <erase:star>"], {"enable_hr": True, "hr_prompt": "a heart and a star <erase:heart>"}),
        (["a house"], {"negative_prompt": "a star and a heart <erase:star> <erase:heart>"}),
        (["a star " + "word " * 100 + "<erase:star>", "a star"], {"batch_size": 2}),
    ],
)
def test_as_the_layers_do(webui: Any, files: dict[str, Path], form: str, prompts: list[str], more: dict[str, Any]) -> None:
    """Rows with tags of their own, AND, prompt editing, the hires pass, negative prompts, prompts of several lengths."""
    use(webui, files["layers"])
    expected = webui.draw(prompts, **more)
    use(webui, files[form])
    sampled = webui.draw(prompts, **more)
    assert not webui.last.comments
    torch.testing.assert_close(sampled, expected, **CLOSE)
    stock = webui.draw(
        [p.split(" <")[0] for p in prompts], script=False, **{k: v.split(" <")[0] if isinstance(v, str) else v for k, v in more.items()}
    )
    assert not torch.equal(sampled, stock)
    for i, prompt in enumerate(prompts):
        if "<" not in prompt and "negative_prompt" not in more:
            assert torch.equal(sampled[i], stock[i])


def test_beside_per_layer_deltas(webui: Any, files: dict[str, Path]) -> None:
    """Each reads the context as it was; either is given back bit for bit."""
    use(webui, files["mixed"])
    both, tags = "a star and a heart", {"batch_size": 2}
    stock = webui.draw(both, script=False)
    mixed = webui.erase("star", "heart", prompt=both)
    assert torch.equal(webui.erase("star", "heart", prompt=f"{both} <keep:star> <keep:heart>"), stock)
    preserved = webui.draw([both, f"{both} <keep:star> <keep:heart>"], True, ["star", "heart"], **tags)
    assert torch.equal(preserved[1], webui.draw([both, both], script=False, **tags)[1])
    torch.testing.assert_close(preserved[:1], mixed, rtol=0, atol=1e-5)
    use(webui, files["layers"])
    torch.testing.assert_close(webui.erase("star", "heart", prompt=both), mixed, **CLOSE)


@pytest.mark.parametrize("form", ["context", "mixed"])
def test_computed_once_a_prompt(webui: Any, files: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(webui, files[form])
    made, calls = webui.part("sepme.apply.composition").Composition, []
    own = made.edit_context
    monkeypatch.setattr(made, "edit_context", lambda self, *args: calls.append(1) or own(self, *args))
    first = webui.erase("star", "heart", steps=3)
    few = len(calls)
    assert 1 <= few <= 2  # prompts and negative prompts, together or apart
    webui.erase("star", "heart", steps=12)
    assert len(calls) == 2 * few
    assert torch.equal(webui.erase("star", "heart", steps=3), first)


def test_another_extension_may_write_over_it(webui: Any) -> None:
    """What it does to a step's conditioning behind us does not stay for the next step."""

    def spoil(params: Any) -> None:
        if params.sampling_step == 0:
            params.text_cond += 1

    callbacks = modules.script_callbacks.callbacks["cfg_denoiser"]
    sampled = []
    for prompt in ("a star", "a house"):
        callbacks.append(spoil)
        try:
            sampled.append((webui.erase("star", prompt=prompt), webui.draw(prompt, script=False)))
        finally:
            callbacks.remove(spoil)
    assert torch.equal(*sampled[1])
    assert not torch.equal(*sampled[0])


@pytest.mark.parametrize("pooled", [0, 24])
@pytest.mark.parametrize("kind", ["a1111"])
def test_marks_of_controlnet_stay(webui: Any, pooled: int, tmp_path: Path) -> None:
    from .test_erasing import test_marks_that_controlnet_puts_before_prompts as same_for_layers

    same_for_layers(webui, pooled, tmp_path)
    modules.shared.sd_model = modules.toy.Checkpoint(seed=2, pooled=pooled)
    train(webui, tmp_path / "context", "context")
    patch = webui.part("scripts.webui.host.patch")
    context = webui.model.encoder.encode(["a star", "a house"]).context
    marked = torch.cat([torch.full_like(context[:, :1], 1024), context], dim=1)
    delta = webui.part("sepme.delta.concept_delta").ConceptDelta.load(tmp_path / "context" / "sepme" / "star.safetensors")
    tables = webui.part("scripts.webui.settings").Tables
    composition = webui.part("sepme.apply.composition").Composition((delta,))
    p = type("P", (), {"sd_model": webui.model})()
    made = patch.ModelPatch(
        p, tables.make(composition, {"star": 1.0}, [{}, {}], [{}, {}]), webui.part("scripts.webui.settings").Settings(), print
    )
    edited = made._edited(marked, torch.ones(1))
    assert torch.equal(edited[:, 0], marked[:, 0])
    assert torch.equal(edited[:, 1:], composition.edit_context(context, torch.ones(1)))
    assert torch.equal(edited[1], marked[1])


def test_sdxl_pooled_vector(webui: Any, tmp_path: Path) -> None:
    modules.shared.sd_model = modules.toy.Checkpoint(seed=2, pooled=24)
    train(webui, tmp_path / "context", "context")
    sampled, stock = webui.erase("star"), webui.draw(script=False)
    assert not torch.equal(sampled, stock)
    assert torch.equal(webui.erase("star", prompt="a red house"), webui.draw("a red house", script=False))
    assert torch.equal(webui.draw("a star <keep:star>", True, ["star"]), stock)
    train(webui, tmp_path / "layers", "layers")
    torch.testing.assert_close(webui.erase("star"), sampled, **CLOSE)


def test_one_file_for_every_checkpoint_of_the_encoder(webui: Any, files: dict[str, Path]) -> None:
    """Other weights and other layers; a tag finds it, and the panel says what it fits."""
    modules.shared.sd_model = modules.toy.Checkpoint(seed=5)
    stock = webui.draw("a star", script=False)
    erased = webui.draw("a star <erase:star>")
    assert not torch.equal(erased, stock)
    assert torch.equal(webui.erase("star"), erased)
    assert not webui.last.comments
    entry = next(e for e in webui.part("scripts.webui.host").library.entries() if e.concept == "star")
    row = webui.part("scripts.webui.panel").Panel._row("star", [entry], {})
    assert "any model with a text encoder of 320 channels" in row
    assert "any SD1.x" in webui.part("sepme.model.families").fits("context-768")


def remade(ui: WebUI, folder: Path, width: int = modules.toy.D_IN, turn: float = 1.0) -> None:
    """The star's file with a context of another width, or of an encoder whose fingerprint is turned round."""
    made = ui.part("sepme.delta.concept_delta").ConceptDelta
    star = made.load(next((Path(modules.paths.models_path) / "sepme").glob("star*.safetensors")))
    known = star.info["text_encoder"]
    info = star.info | {"text_encoder": known | {"width": width, "figures": [turn * v for v in known["figures"]]}}
    down, up = star.down[:, :1].repeat(1, width) if width != star.d_in else star.down, star.up_factor("context")
    up = up[:1].repeat(width, 1) if width != star.d_in else up
    use(ui, folder)
    ui.part("scripts.webui.host").library.save(made.from_factors(star.concept, down, {"context": up}, star.gate, info))


def test_of_another_width_is_refused_by_name(webui: Any, tmp_path: Path) -> None:
    remade(webui, tmp_path, width=768)
    assert torch.equal(webui.erase("star"), webui.draw(script=False))
    webui.erase("star")
    assert any("'star'" in c and "nothing is erased" in c for c in webui.last.comments), webui.last.comments
    assert torch.equal(webui.draw("a star <erase:star>"), webui.draw(script=False))


@pytest.mark.parametrize(("turn", "said", "erases"), [(-1.0, "another text encoder", False), (0.9, "another version or layer", True)])
def test_of_another_text_encoder(webui: Any, tmp_path: Path, turn: float, said: str, erases: bool) -> None:
    remade(webui, tmp_path, turn=turn)
    for args in (("a star", True, ["star"]), ("a star <erase:star>",)):
        sampled = webui.draw(*args)
        assert any("'star'" in c and said in c for c in webui.last.comments), webui.last.comments
        assert torch.equal(sampled, webui.draw("a star", script=False)) is not erases
