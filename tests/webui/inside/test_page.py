"""Gradio's real Blocks, driven through its client."""

from __future__ import annotations

import html
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr
import modules.infotext_utils
import modules.toy
import pytest
import torch
from gradio_client import Client
from webui.conftest import ROOT

OLD = gr.__version__.startswith("3.")


@pytest.fixture(scope="module")
def client(page: SimpleNamespace) -> Iterator[Client]:
    made = Client(page.url, **({"output_dir": str(page.models)} if OLD else {"download_files": str(page.models), "verbose": False}))
    yield made
    made.close() if hasattr(made, "close") else None


@pytest.fixture(autouse=True)
def with_client(page: SimpleNamespace, client: Client) -> None:
    page.client = client


def call(page: SimpleNamespace, name: str, *args: Any) -> Any:
    return page.client.predict(*args, api_name=f"/{name}")


def generate(page: SimpleNamespace, prompt: str, *args: Any, tab: str = "txt2img") -> tuple[float, str]:
    given = args or (False, [], "", True, "auto")
    result, info = call(page, f"{tab}_generate", prompt, *given, *[""] * (6 - len(given)))  # gradio 3's client wants them all
    return json.loads(result)["sum"], info


def rows_of(page: SimpleNamespace, chosen: list[str], strengths: str) -> str:
    return str(call(page, "script_txt2img_sepme_concepts_rows", chosen, strengths, ""))


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_generate_paste_generate(page: SimpleNamespace, tab: str) -> None:
    stock, plain = generate(page, "a star", tab=tab)
    erased, info = generate(page, "a star", True, ["star", "heart"], '{"heart": 0.5}', False, "auto", tab=tab)
    assert erased != stock
    enabled, concepts, strengths, gate, _ = (_value(v) for v in call(page, f"{tab}_paste", info))
    assert (enabled, sorted(concepts), json.loads(strengths), gate) == (True, ["heart", "star"], {"star": 1.0, "heart": 0.5}, False)
    assert generate(page, "a star", enabled, concepts, strengths, gate, "auto", tab=tab)[0] == erased
    enabled, concepts, strengths, gate, named = (_value(v) for v in call(page, f"{tab}_paste", plain))
    assert (enabled, concepts, strengths, gate, named) == (False, [], "", True, "")
    assert all(_value(v) == "unchanged" for v in call(page, f"{tab}_paste", "only words"))


def _value(update: Any) -> Any:
    """Gradio's clients differ in what they make of an update."""
    return update.get("value", "unchanged") if isinstance(update, dict) and update.get("__type__") == "update" else update


def test_unknown_hash_warns_and_changes_nothing_else(page: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    _, info = generate(page, "a star", True, ["star", "heart"], "", True, "auto")
    digest = info.split("heart (")[1][:10]
    fields = page.ui.runner.alwayson_scripts[0]
    with gr.Blocks():
        fields.ui(False)
    pasted = modules.infotext_utils.paste(fields.infotext_fields, info.replace(digest, "ffffffffff"))  # gradio 3's client knows no warnings
    assert [update["value"] for update in pasted[:2]] == [True, ["star"]]
    assert "'heart' (ffffffffff)" in capsys.readouterr().out


def test_rows_and_refresh(page: SimpleNamespace) -> None:
    rows = rows_of(page, ["star", "moon"], '{"moon": 0}')
    assert rows.count("sepme-row") == 2
    assert 'data-concept="moon"' in rows
    assert "sepme-off" in rows
    assert rows.count(f'title="{page.ui.part("scripts.webui.grades").sentence("good")}"') == 2
    assert "not JSON" in rows_of(page, ["star"], "{")
    assert "no such file" in rows_of(page, ["<b>x</b>"], "")
    assert "<b>x" not in rows_of(page, ["<b>x</b>"], "")
    assert rows.count("<span>Safe</span>, <span>unet-320x3") == 2, rows
    source = next((page.models / "sepme").glob("star*.safetensors"))
    shutil.copy(source, page.models / "sepme" / "copy.safetensors")
    update = call(page, "script_txt2img_sepme_concepts_refresh", ["star"])
    assert [c[0] if isinstance(c, (list, tuple)) else c for c in update["choices"]] == ["heart", "moon", "star"]


def test_small_pictures_beside_names(page: SimpleNamespace) -> None:
    """In the accordion and in the tab's lists, as the file's header has them; what is no picture is not shown."""
    format = page.ui.part("sepme.delta.concept_delta")
    picture = "data:image/png;base64,iVBORw0KGgo="
    delta = format.ConceptDelta.load(page.models / "sepme" / "heart.safetensors")
    for name, text in (("pictured", picture), ("fake", '" onerror="alert(1)')):
        made = replace(delta, concept=replace(delta.concept, name=name), thumbnail=text)
        made.save(page.models / "sepme" / f"{name}.safetensors")
        for shown in (
            rows_of(page, [name], ""),
            call(page, "sepme_verify_files_cards", [name]),
            call(page, "sepme_export_files_cards", [name]),
        ):
            assert ">Safe<" in shown
            assert shown.count(f'<img class="sepme-thumbnail" src="{picture}"') == (text == picture)
            assert "onerror" not in shown
        (page.models / "sepme" / f"{name}.safetensors").unlink()


def test_api_arguments_keep_their_order(page: SimpleNamespace) -> None:
    """``alwayson_scripts: {"sepme concepts": {"args": [...]}}`` is positional: new controls come last."""
    panel = page.ui.part("scripts.webui.panel")
    with gr.Blocks():
        controls = panel.Panel(page.ui.part("scripts.webui.host").library, lambda name: name).controls
    assert [type(c).__name__ for c in controls] == ["InputAccordionImpl", "Dropdown", "Textbox", "Checkbox", "Dropdown", "Textbox"]
    assert [c.label for c in controls[1:]] == ["Concepts to erase", "Strengths", panel.GATE, "Backend", "Erase what is not a file yet"]


def _texts(blocks: Any) -> set[str]:
    """What stands on a page, in the pieces in which the hosts translate it."""
    found: set[str] = set()
    for block in blocks.blocks.values():
        shown = [getattr(block, name, None) for name in ("label", "info", "placeholder")] if getattr(block, "show_label", True) else []
        shown += [block.value] if isinstance(block, (gr.HTML, gr.Button)) else []
        for text in filter(None, shown):
            pieces = re.split(r"<code>.*?</code>|<[^>]*>", text) if isinstance(block, gr.HTML) else [text]
            found |= {html.unescape(piece).strip() for piece in pieces}
    return {text for text in found if re.search("[a-z]{3}", text)}


def test_all_of_it_is_there_in_chinese(page: SimpleNamespace) -> None:
    chinese = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))
    panel, tab = page.ui.part("scripts.webui.panel"), page.ui.part("scripts.webui.tab")
    with gr.Blocks() as blocks:
        panel.Panel(page.ui.part("scripts.webui.host").library, lambda name: name)
        tab.make_tab()[0][0].render()
    same_in_all = {
        "LoRA",
        "sd15/",
        "van gogh",
        "van gogh, picasso",
        '{"van gogh": 0.7}',
        page.ui.part("scripts.webui.training").BOOK.strip(),
    }
    missing = _texts(blocks) - chinese.keys() - same_in_all
    assert missing == set()
    words = json.loads((ROOT / "locales" / "zh" / "main.json").read_text(encoding="utf-8"))["sepme"]
    for name, text in page.ui.part("scripts.webui.grades").WORDS.items():
        assert not name.startswith("grade.") or chinese[text] == words[name]


def test_train_verify_export(page: SimpleNamespace) -> None:
    book = "concepts: [house, tree]"
    status, _ = call(page, "sepme_train", book, "closed-form", "subspace", "the mode's own", 5, 0, "new/")
    assert status.count("<tr>") == 3, status
    assert (page.models / "sepme" / "new" / "house.safetensors").exists()
    assert generate(page, "a house", True, ["house"], "", True, "auto")[0] != generate(page, "a house")[0]
    words = ("Safe", "Nearly safe", "Not safe")
    grades = [word for word in words if f">{word}" in status]
    assert "certificate" in status
    assert grades
    assert 'src="data:image/jpeg;base64,' in rows_of(page, ["house"], "")  # drawn by the tab
    status, _ = call(page, "sepme_verify", ["house", "tree"])
    assert "certificate" in status
    assert [word for word in words if f">{word}" in status] == grades  # the one that ComfyUI shows
    assert status.count("yes") == 2, status
    assert "nearby words were not measured" in status
    status, _ = call(page, "sepme_verify_nearby", ["house"], 12)
    assert re.search(r"\d+ (of \d+ )?nearby words? change|to the preserve list", status), status
    assert "must be a whole number from 0" in call(page, "sepme_verify_nearby", ["house"], -1)[0]
    status, _ = call(page, "sepme_export", ["house"], "LoRA", "houses", "")
    assert "Wrote" in status
    assert (page.models / "Lora" / "houses.safetensors").exists()
    assert "already a file" in call(page, "sepme_export", ["house"], "LoRA", "houses", "")[0]
    assert "choose at least one" in call(page, "sepme_export", [], "LoRA", "x", "")[0]


def test_what_is_missing_is_one_sentence(page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint at all; one of a family that has no deltas: at the accordion and on every page of the tab."""
    import modules.sd_models
    import modules.shared

    def said() -> list[str]:
        train = call(page, "sepme_train", "concepts: [star]", "closed-form", "subspace", "auto", 5, 0, "missing/")
        return [rows_of(page, ["star"], ""), train[0], call(page, "sepme_verify", ["star"])[0]]

    other = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)), sd_checkpoint_info=SimpleNamespace(filename="x"))
    with monkeypatch.context() as patch:
        patch.setattr(modules.shared, "sd_model", other)
        for text in said():
            assert "The loaded checkpoint is no SD" in text
            assert text.count(". ") < 2
    with monkeypatch.context() as patch:
        patch.setattr(modules.sd_models, "checkpoints_list", {})
        merged = page.ui.part("scripts.webui.tab").CHECKPOINT
        for text in (*said(), call(page, "sepme_export", ["star"], merged, "missing", "")[0]):
            assert "put one into models/Stable-diffusion" in text
    assert not (page.models / "sepme" / "missing").exists()
    assert "sepme-error" not in rows_of(page, ["star"], "")


def test_training_before_the_first_picture(page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forge loads the chosen checkpoint when a picture is asked for, or now."""
    import modules.sd_models
    import modules.shared

    monkeypatch.setattr(modules.shared, "kind", "forge")
    monkeypatch.setattr(modules.sd_models, "waiting", modules.toy.Checkpoint())
    monkeypatch.setattr(modules.shared, "sd_model", SimpleNamespace(cond_stage_model=None))
    status, _ = call(page, "sepme_train", "concepts: [early]", "closed-form", "subspace", "auto", 5, 0, "early/")
    assert (page.models / "sepme" / "early" / "early.safetensors").exists(), status


def test_training_shows_losses_and_stops(page: SimpleNamespace) -> None:
    job = page.client.submit("concepts: [cat]", "gcirs", "subspace", "the mode's own", 12, 0, "", api_name="/sepme_train")
    status, plot = job.result(timeout=120)
    assert "<tr>" in status, status
    assert "<polyline" in plot
    assert (page.models / "sepme" / "cat.safetensors").exists()
    import modules.shared

    def stop() -> None:
        while modules.shared.state.job != "sepme":
            time.sleep(0.01)
        time.sleep(0.5)
        modules.shared.state.interrupt()

    threading.Thread(target=stop, daemon=True).start()
    status, _ = call(page, "sepme_train", "concepts: [dog]", "gcirs", "subspace", "the mode's own", 1000, 0, "")
    assert "Stopped" in status
    assert not (page.models / "sepme" / "dog.safetensors").exists()
    assert not [n for n, m in page.ui.model.unet.named_modules() if "forward" in m.__dict__]


def test_interrupt_while_waiting(page: SimpleNamespace) -> None:
    """Behind a picture in the host's queue: the training never begins, the picture goes on."""
    import modules.call_queue
    import modules.shared

    host = page.ui.part("scripts.webui.host")
    with modules.call_queue.queue_lock:
        modules.shared.state.begin("a picture")
        job = page.client.submit("concepts: [waiting]", "closed-form", "subspace", "auto", 5, 0, "", api_name="/sepme_train")
        while not job.outputs():
            time.sleep(0.01)
        host.interrupt()
        assert not modules.shared.state.interrupted
        modules.shared.state.end()
    status, _ = job.result(timeout=60)
    assert "Stopped" in status
    assert not (page.models / "sepme" / "waiting.safetensors").exists()


@pytest.mark.parametrize(
    ("book", "sentence"),
    [
        ("", "no list of concepts"),
        ("concepts: [star, star]", "listed twice"),
        ("concepts: [star]\npreserve_file: /etc/passwd", "leads out of"),
    ],
)
def test_bad_books_are_one_sentence(page: SimpleNamespace, book: str, sentence: str) -> None:
    status, _ = call(page, "sepme_train", book, "closed-form", "subspace", "auto", 5, 0, "")
    assert sentence in status


def test_prefix_cannot_leave_the_folder(page: SimpleNamespace) -> None:
    status, _ = call(page, "sepme_train", "concepts: [star]", "closed-form", "subspace", "the mode's own", 5, 0, "../../")
    assert "leads out of" in status
