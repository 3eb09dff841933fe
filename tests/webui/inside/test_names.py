"""What users write for a concept means the same everywhere: in tags, the panel, strengths, the API, plots, infotext; and what means
nothing is said in a sentence."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import modules.infotext_utils
import modules.xyz_grid
import pytest
import torch

ODD = [
    "C++",
    "Disney+",
    "none",
    "a, b",
    'the "star"',
    "star (shape)",
    "salt + pepper",
    "[x|y]",
    "x (0123456789)",
    "🌟",
    "a\\b",
    "'",
    '"q" + r',
]


@pytest.fixture
def ui(make_webui: Any, delta_files: Any, tmp_path: Any) -> Any:
    """A host with files of its own."""
    shutil.copytree(delta_files / "sepme", tmp_path / "sepme")
    made = make_webui("a1111", tmp_path)
    yield made
    made.part("scripts.webui.generation").release()


def entry_of(ui: Any, concept: str) -> Any:
    return next(e for e in ui.part("scripts.webui.host").library.entries() if e.concept == concept)


def ways(ui: Any, concept: str) -> dict[str, str]:
    """All that a concept's file can be called."""
    entry = entry_of(ui, concept)
    return {
        "name": concept, "other case": concept.upper(), "label": f"{concept} [{entry.content_hash[:10]}]", "file": entry.name,
        "stem": entry.name.removesuffix(".safetensors"), "hash": entry.content_hash, "its beginning": entry.content_hash[:10],
    }  # fmt: skip


def named(ui: Any, name: str, scale: float = 1.0) -> Any:
    """A file of the star's delta for another concept, or with other content for the same."""
    parts = (ui.part("sepme.delta.concept_delta").ConceptDelta, ui.part("sepme.concepts").Concept)
    star = parts[0].load(entry_of(ui, "star").path)
    up = {k: scale * v for k, v in star.up.items()}
    ui.part("scripts.webui.host").library.save(parts[0](parts[1](name, (name,)), star.down, up, star.scale, star.gate, star.info))


def note(ui: Any) -> str:
    """What is said in the picture's infotext; the same is below it on the page."""
    said = str(ui.last.extra_generation_params.get("SepME note", ""))
    assert all(c.removeprefix("SepME: ") in said for c in ui.last.comments)
    assert bool(said) == ("SepME note:" in ui.infotexts[0])
    return said


def test_all_names_of_a_file_mean_it(ui: Any) -> None:
    stock, erased, half = ui.draw(script=False), ui.erase("star"), ui.erase("star", strengths='{"star": 0.5}')
    for way, text in ways(ui, "star").items():
        assert torch.equal(ui.draw(f"a star <erase:{text}>"), erased), way
        assert torch.equal(ui.draw(f"a star <erase:{text}:0.5>"), half), way
        assert torch.equal(ui.draw(f"a star <keep:{text}>", True, ["star"]), stock), way
        assert torch.equal(ui.erase(text), erased), way
        assert torch.equal(ui.draw("a star", True, [text], {text: 0.5}), half), way
        assert torch.equal(ui.draw("a star", True, ["star"], {text: 0.5}), half), way
        assert torch.equal(ui.draw("a star <keep:star>", True, [text]), stock), way
        assert torch.equal(
            ui.draw("a star", sepme_concepts=ui.part("scripts.webui.axes").concepts_of(text, [entry_of(ui, "star")])), erased
        )
        assert note(ui) == "", way
        assert ui.last.extra_generation_params["SepME concepts"].startswith("star ("), way


def test_a_copy_under_another_name_is_the_same_file(ui: Any) -> None:
    erased, stock = ui.erase("star"), ui.draw(script=False)
    shutil.copy(entry_of(ui, "star").path, ui.folder / "copy.safetensors")
    assert torch.equal(ui.erase("star", "copy.safetensors"), erased)
    assert torch.equal(ui.draw("a star <keep:copy.safetensors>", True, ["star"]), stock)
    assert torch.equal(ui.draw("a star", True, ["star"], {"copy": 0}), stock)
    assert note(ui) == ""


def test_two_files_of_one_concept(ui: Any) -> None:
    named(ui, "star", -1.0)
    stock = ui.draw(script=False)
    first, second = (e for e in ui.part("scripts.webui.host").library.entries() if e.concept == "star")
    labels = [f"star [{e.content_hash[:10]}]" for e in (first, second)]
    assert torch.equal(ui.draw("a star <erase:star>"), stock)
    assert "means several files" in note(ui)
    assert labels[0] in note(ui)
    assert torch.equal(ui.draw("a star", True, ["star"]), stock)
    assert "means several files" in note(ui)
    sampled = [ui.erase(label) for label in labels]
    assert not torch.equal(*sampled)
    for label, picture in zip(labels, sampled, strict=True):
        assert torch.equal(ui.draw(f"a star <erase:{label}>"), picture)
        assert torch.equal(ui.draw("a star <keep:star>", True, [label]), stock)  # of the two, the one that is chosen
        assert note(ui) == ""
    assert torch.equal(ui.draw(f"a star <keep:{labels[1]}>", True, [labels[0]]), sampled[0])
    assert "another file than" in note(ui)
    ui.draw(f"a star <erase:{labels[1]}> <erase:{labels[0]}>")
    assert "another file than" in note(ui)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((["star"], {"satr": 0.0}), "The strengths name 'satr'"),
        ((["star"], {"star": 0.5, "star.safetensors": 1}), "name each concept once"),
        ((["star"], '{"star": NaN}'), "'nan' of 'star' is no number"),
        ((["star"], "NaN"), "one JSON object"),
        ((["star"], float("nan")), "one JSON object"),
        (([float("nan")],), "list of concepts"),
        ((["star"], "", float("nan")), "fourth argument"),
        ((["star"], "", True, float("nan")), "no backend 'nan'"),
    ],
)
def test_what_means_nothing_erases_nothing(ui: Any, args: Any, sentence: str) -> None:
    assert torch.equal(ui.draw("a star", True, *args), ui.draw(script=False))
    ui.draw("a star", True, *args)
    assert sentence in note(ui)
    assert note(ui).startswith("nothing is erased. ")


def test_strengths_of_what_is_not_chosen(ui: Any) -> None:
    """The page keeps them for later; in the API they are a mistake."""
    erased = ui.erase("star")
    assert torch.equal(ui.draw("a star", True, ["star"], {"moon": 0.5}), erased)
    assert note(ui) == ""
    assert torch.equal(ui.draw("a star", True, ["star"], {"moon": 0.5}, is_api=True), erased)
    assert "strength of moon has no effect" in note(ui)


TAGS = [
    "<keep:star:0.7:0.5>", "<erase:star:0.7:0.5>", "<keep:star", "<keep star>", "<erase:star:1:lbw=ALL>", "＜keep:star＞", "<keep：star>",
    "< erase:star>", "<erase>", "<erase:>", "<keep:star:1>",
]  # fmt: skip
PARTS = {
    "<erase:star:lbw=MID>": "'lbw=MID' of 'star'", "<erase:star:0,5>": "'0,5' of 'star'", "<erase:star;0.5>": "'star;0.5'",
    "&lt;erase:star&gt;": "&lt;erase:star",
}  # fmt: skip


@pytest.mark.parametrize("tag", [*TAGS, *PARTS])
def test_tags_that_cannot_be_read_are_named(ui: Any, tag: str) -> None:
    """In the prompt of one picture: it is drawn with what the panel says; the other pictures' tags act."""
    prompts = [f"a star {tag}", "a star <keep:star>"]
    sampled = ui.draw(prompts, True, ["star"], batch_size=2)
    assert torch.equal(sampled[1], ui.draw(["a star"] * 2, script=False, batch_size=2)[1])
    ui.draw(f"a star {tag}")
    assert PARTS.get(tag, tag) in note(ui)
    assert ui.infotexts[0].startswith(f"a star {tag}\n")


STOCK = ["a star", "a star, a  moon ,, x", "a star\n\nBREAK (moon:1.2), [a|b]", " a star , (a, (b)) "]


@pytest.mark.parametrize("with_tag", ["{} <keep:star>", "<keep:star> {}", "{}, <keep:star>", "<keep:star>, {}", "{}\n<keep:star>"])
@pytest.mark.parametrize("stock", STOCK)
def test_the_host_encodes_the_stock_prompt(ui: Any, stock: str, with_tag: str) -> None:
    """All but the tag keeps its bytes, in every pass and prompt, and the infotext has what the user wrote."""
    prompt, hires = with_tag.format(stock), with_tag.format(f"{stock} hires")
    ui.model.texts.clear()
    expected = ui.draw(stock, script=False, negative_prompt=stock, enable_hr=True, hr_prompt=f"{stock} hires")
    texts = list(ui.model.texts)
    assert stock in texts
    ui.model.texts.clear()
    assert torch.equal(ui.draw(prompt, True, ["star"], negative_prompt=prompt, enable_hr=True, hr_prompt=hires), expected)
    assert ui.model.texts == texts
    assert ui.infotexts[0].startswith(f"{prompt}\nNegative prompt: {prompt}\nSteps:")
    params = modules.infotext_utils.parse_generation_parameters(ui.infotexts[0])
    assert params["Hires prompt"] == hires


def test_hires_prompts_in_batches(ui: Any) -> None:
    """Each batch has its own part of the list, and the list itself stays as it was written."""
    prompts = ["a star <erase:star>", "a star", "a heart <erase:heart>"]
    sampled = ui.draw(prompts, hr_prompt=list(prompts), n_iter=3, enable_hr=True)
    assert ui.last.all_hr_prompts == prompts
    for i, prompt in enumerate(prompts):
        assert torch.equal(sampled[i], ui.draw(prompt, seed=i, enable_hr=True)[0])


@pytest.mark.parametrize("name", ODD)
def test_odd_names(ui: Any, name: str) -> None:
    """Offered, chosen, plotted, recorded and restored."""
    named(ui, name, 0.9)
    axes, panel = ui.part("scripts.webui.axes"), ui.runner.alwayson_scripts[0]
    _, axis = ui.grid.axis_options
    stock, erased, infotext = ui.draw(script=False), ui.erase(name), ui.infotexts[0]
    assert not torch.equal(erased, stock)
    choices = axis.choices()
    assert name in choices
    assert choices[0] == ("nothing" if name == "none" else "none")
    written = modules.xyz_grid.list_to_csv_string([*choices, f'"{name}" + moon'] if '"' not in name else choices)
    for csv_mode in (False, True):
        values = modules.xyz_grid.process_axis(axis, written, choices, csv_mode)
        assert values[: len(choices)] == choices
        for value, expected in ((values[0], stock), (values[choices.index(name)], erased)):
            p = SimpleNamespace()
            axis.apply(p, value, values)
            assert torch.equal(ui.draw("a star", **vars(p)), expected), value
    assert axes.concepts_of(f"moon + {name}", ui.part("scripts.webui.host").library.entries())[0] == "moon" or '"' in name
    import gradio as gr

    with gr.Blocks():
        panel.ui(False)
        enabled, concepts, strengths, *_ = (u["value"] for u in modules.infotext_utils.paste(panel.infotext_fields, infotext))
    assert (enabled, concepts) == (True, [name])
    assert torch.equal(ui.draw("a star", enabled, concepts, strengths), erased)
    assert note(ui) == ""


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("C++ + star", ["C++", "star"]), ("star+C++", ["star", "C++"]), ('"C++" + star', ["C++", "star"]), ("moon+star", ["moon", "star"]),
        ("salt + pepper", ["salt + pepper"]), ("salt + pepper + star", ["salt + pepper", "star"]), ("C#", ["C#"]), ("D++", ["D++"]),
        ("D++ + star", ["D++", "star"]), ("star.safetensors + moon", ["star.safetensors", "moon"]), ("none", ["none"]), ("", [""]),
    ],
)  # fmt: skip
def test_values_of_the_plots_axis(ui: Any, value: str, names: list[str]) -> None:
    for name in ("C++", "salt + pepper"):
        named(ui, name)
    p = SimpleNamespace()
    ui.grid.axis_options[1].apply(p, value, [value])
    assert p.sepme_concepts == [n for n in names if n]


def test_strengths_of_a_plot_are_checked(ui: Any) -> None:
    assert torch.equal(ui.draw("a star", True, ["star"], sepme_strength=float("nan")), ui.draw(script=False))
    assert torch.equal(ui.draw("a star", True, ["star"], sepme_strength=0.0), ui.draw(script=False))
    ui.draw("a star", True, ["star"], sepme_strength=1e9)
    assert "from -100 to 100" in note(ui)


def test_warnings_are_text(ui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infotexts come from strangers, and later gradios show a warning as HTML."""
    import gradio as gr

    panel, shown = ui.part("scripts.webui.panel"), []
    monkeypatch.setattr(gr, "Warning", shown.append)
    for old in (True, False):
        monkeypatch.setattr(panel, "GRADIO_3", old)
        panel.Panel._read_concepts(
            SimpleNamespace(library=ui.part("scripts.webui.host").library),
            {"SepME concepts": "<img src=x onerror=alert(1)> (ffffffffff): 1"},
        )
    assert "<img" in shown[0]
    assert "<" not in shown[1]
    assert "&lt;img" in shown[1]
