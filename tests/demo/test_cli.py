"""The command line on the embedded model, as a user runs it: in order, with files, and with bad input."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sepme import cli
from sepme.concepts import Concept
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.thumbnail import picture
from sepme.demo.run import demo_suite

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sepme", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Closed-form deltas of six concepts, made by the command line."""
    folder = tmp_path_factory.mktemp("deltas")
    book = folder / "book.json"
    book.write_text(demo_suite(6).book().dumps())
    command = [
        sys.executable,
        "-m",
        "sepme.cli",
        "train",
        "demo",
        str(book),
        "-o",
        str(folder),
        "--objective",
        "closed-form",
        "--nearby",
        "40",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["deltas"]) == 6
    return folder


def document(out: str) -> Any:
    """The one JSON document on stdout."""
    return json.loads(out)


def test_inspect_and_verify(run: Run, trained: Path) -> None:
    code, out, _ = run("inspect", trained / "rocket.safetensors", "--json")
    assert code == 0
    assert document(out)[0]["concept"] == "rocket"
    assert document(out)[0]["bytes"] <= 500_000
    code, out, _ = run("verify", "demo", *sorted(trained.glob("*.safetensors")), "--nearby", 20, "--json")
    report = document(out)
    assert code == 0, report
    assert report["holds"]
    assert all(v == 0 for d in report["deltas"] for v in d["leakage_gated"].values())
    assert len(report["matrix"]) == 6


def test_files_carry_a_small_picture(run: Run, trained: Path, tmp_path: Path) -> None:
    """Stock beside erased, unless it is not wanted."""
    (tmp_path / "book.json").write_text("[rocket]")
    made = "train", "demo", tmp_path / "book.json", "-o", tmp_path, "--objective", "closed-form", "--nearby", 0, "--no-thumbnail"
    code, _, err = run(*made)
    assert code == 0, err
    with_picture, without = (ConceptDelta.load(folder / "rocket.safetensors") for folder in (trained, tmp_path))
    shown = picture(with_picture.thumbnail)
    assert shown is not None
    image = Image.open(io.BytesIO(shown.data)).convert("L")
    stock, erased = (torch.tensor(list(image.crop((x, 0, x + 128, 128)).tobytes())).float() for x in (0, 128))
    assert (stock - erased).abs().mean() > 3
    assert without.thumbnail == ""


def test_verify_fails_for_a_gate_that_lets_others_in(run: Run, trained: Path, tmp_path: Path) -> None:
    delta = ConceptDelta.load(trained / "rocket.safetensors")
    ConceptDelta(delta.concept, delta.down, delta.up, delta.scale, 0.0, delta.info).save(tmp_path / "open.safetensors")
    code, out, _ = run("verify", "demo", tmp_path / "open.safetensors", "--nearby", 0, "--json")
    assert code == 1
    assert not document(out)["holds"]


def test_generate_with_tags(run: Run, trained: Path, tmp_path: Path) -> None:
    """Each prompt has its own toggles; the untouched and restored pictures equal stock's."""

    def picture(name: str, *arguments: object) -> Image.Image:
        code, _, err = run("generate", "demo", *arguments, "-o", tmp_path / name, "--steps", 6)
        assert code == 0, err
        return Image.open(tmp_path / name)

    deltas = ["--delta", trained / "rocket.safetensors", "--delta", trained / "openmoji.safetensors"]
    stock = picture("a.png", "a rocket", "a rocket", "a church")
    mixed = picture("b.png", "a rocket", "a rocket <keep:rocket>", "a church", *deltas)
    assert stock.size == (128 * 3 + 4, 128)
    parts = [(130 * i, 0, 130 * i + 128, 128) for i in range(3)]
    same = [list(stock.crop(p).tobytes()) == list(mixed.crop(p).tobytes()) for p in parts]
    assert same == [False, True, True]
    assert picture("c.png", "a rocket", "a rocket", "a church", *deltas, "--keep", "rocket").tobytes() == stock.tobytes()


BAD = {
    "unknown name to erase": (
        ["generate", "demo", "x", "-o", "{tmp}/a.png", "--delta", "{deltas}/rocket.safetensors", "--erase", "moon"],
        "moon",
    ),
    "unknown name to keep": (
        ["generate", "demo", "x", "-o", "{tmp}/a.png", "--delta", "{deltas}/rocket.safetensors", "--keep", "moon"],
        "moon",
    ),
    "unknown tag": (["generate", "demo", "x <erase:moon>", "-o", "{tmp}/a.png"], "moon"),
    "strength is no number": (
        ["generate", "demo", "x", "-o", "{tmp}/a.png", "--delta", "{deltas}/rocket.safetensors", "--erase", "rocket:nan"],
        "strength",
    ),
    "missing delta": (["inspect", "{tmp}/none.safetensors"], "none.safetensors"),
    "pickle": (["inspect", "{tmp}/x.ckpt"], "pickle"),
    "same delta twice": (
        ["generate", "demo", "x", "-o", "{tmp}/a.png", "--delta", "{deltas}/rocket.safetensors", "--delta", "{deltas}/rocket.safetensors"],
        "rocket",
    ),
    "no such model": (["verify", "{tmp}/nowhere", "{deltas}/rocket.safetensors"], "nowhere"),
    "book with duplicate names": (["train", "demo", "{tmp}/twice.yaml", "-o", "{tmp}/out"], "twice"),
    "book with an empty name": (["train", "demo", "{tmp}/empty.yaml", "-o", "{tmp}/out"], "empty"),
    "concept identical to a preserved prompt": (["train", "demo", "{tmp}/kept.yaml", "-o", "{tmp}/out"], "preserve"),
    "concept that reads like a preserved prompt": (["train", "demo", "{tmp}/reads.yaml", "-o", "{tmp}/out"], "preserve"),
    "unwritable output": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/good.yaml/out"], "written"),
    "unknown objective": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/out", "--objective", "magic"], "magic"),
    "unknown --only": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/out", "--only", "moon"], "moon"),
    "no such option": (["train", "demo", "{tmp}/good.yaml", "--colour"], "colour"),
    "tag that is not understood": (["generate", "demo", "x <keep:rocket:0.7:0.5>", "-o", "{tmp}/a.png"], "<keep:rocket:0.7:0.5>"),
    "tag without end": (["generate", "demo", "x <keep:rocket", "-o", "{tmp}/a.png"], "<keep:rocket"),
    "full-width tag": (["generate", "demo", "x ＜keep:rocket＞", "-o", "{tmp}/a.png"], "＜keep:rocket＞"),
    "two strengths to erase": (
        ["generate", "demo", "x", "-o", "{tmp}/a.png", "--delta", "{deltas}/rocket.safetensors", "--erase", "rocket:0.5:1"],
        "rocket:0.5:1",
    ),
    "two strengths to export": (
        ["export", "{deltas}/rocket.safetensors", "-o", "{tmp}/l.safetensors", "--erase", "rocket:0.5:1"],
        "rocket:0.5:1",
    ),
    "no steps": (["generate", "demo", "x", "-o", "{tmp}/a.png", "--steps", "0"], "steps"),
    "more steps than the model has": (["generate", "demo", "x", "-o", "{tmp}/a.png", "--steps", "2000"], "steps"),
    "guidance is no number": (["generate", "demo", "x", "-o", "{tmp}/a.png", "--guidance", "nan"], "guidance"),
    "seed beyond 64 bits": (["generate", "demo", "x", "-o", "{tmp}/a.png", "--seed", "99999999999999999999"], "seed"),
    "size of nothing": (["generate", "demo", "x", "-o", "{tmp}/a.png", "--size", "0"], "size"),
    "threshold is no number": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/out", "--threshold", "nan"], "threshold"),
    "training seed beyond 64 bits": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/out", "--seed", "99999999999999999999"], "seed"),
    "no concepts to count": (["verify", "demo", "{deltas}/rocket.safetensors", "--capacity", "--count", "0"], "count"),
    "two deltas of one concept": (["verify", "demo", "{deltas}/rocket.safetensors", "{deltas}/rocket.safetensors"], "rocket"),
    "export over its input": (["export", "{deltas}/rocket.safetensors", "-o", "{deltas}/rocket.safetensors"], "reads"),
    "export over another delta": (["export", "{deltas}/rocket.safetensors", "-o", "{deltas}/church.safetensors"], "church"),
    "import over its input": (["import", "demo", "{tmp}/x.safetensors", "--as", "rocket", "-o", "{tmp}/x.safetensors"], "reads"),
    "import over another delta": (["import", "demo", "{tmp}/x.safetensors", "--as", "sun", "-o", "{deltas}/rocket.safetensors"], "rocket"),
    "import to no delta's name": (["import", "demo", "{tmp}/x.safetensors", "--as", "sun", "-o", "{tmp}/good.yaml"], "safetensors"),
    "reproject over its input": (
        ["reproject", "demo", "{deltas}/rocket.safetensors", "--against", "{tmp}/good.yaml", "-o", "{deltas}"],
        "reads",
    ),
    "training over another's file": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/taken", "--objective", "closed-form"], "'sun'"),
    "training over no delta": (["train", "demo", "{tmp}/good.yaml", "-o", "{tmp}/foreign", "--objective", "closed-form"], "no delta"),
    "no PNG": (["generate", "demo", "x", "-o", "{tmp}/a.gif"], "PNG"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, run: Run, trained: Path, tmp_path: Path) -> None:
    books = {
        "twice": "concepts: [rocket, Rocket]",
        "empty": "concepts: [rocket, '']",
        "kept": "concepts: [rocket]\npreserve: ['a rocket']",
        "reads": 'concepts: [{name: s, prompts: ["caf\\u00e9"]}]\npreserve: ["cafe\\u0301"]',
        "good": "concepts: [rocket, church]",
    }
    for name, text in books.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "x.safetensors").write_bytes(b"somebody's")
    rocket = ConceptDelta.load(trained / "rocket.safetensors")
    replace(rocket, concept=Concept("sun")).save(tmp_path / "taken" / "rocket.safetensors")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "rocket.safetensors").write_bytes(b"somebody's")
    before = {path: path.read_bytes() for folder in (tmp_path, trained) for path in folder.rglob("*") if path.is_file()}
    arguments, needle = BAD[case]
    code, out, err = run(*(a.format(tmp=tmp_path, deltas=trained) for a in arguments))
    lines = [line for line in err.splitlines() if line.startswith("sepme: ")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert needle.lower() in lines[0].lower()
    assert "Traceback" not in err
    assert {path: path.read_bytes() for folder in (tmp_path, trained) for path in folder.rglob("*") if path.is_file()} == before


def test_names_that_give_one_file_name_or_look_like_markup(run: Run, tmp_path: Path) -> None:
    """Nobody's delta is lost, and what users call things is printed as it is."""
    names = ["C++", "C#", "😀", "🎨", "con", "rocket[/b]", "[red]x"]
    book, out = tmp_path / "book.json", tmp_path / "out"
    train = "train", "demo", book, "-o", out, "--objective", "closed-form", "--nearby", 0, "--no-thumbnail"
    for i, name in enumerate(names):
        book.write_text(json.dumps([{"name": name, "prompts": [("rocket", "tulip")[i % 2]]}]))
        code, said, err = run(*train)
        assert code == 0, err
        assert name in said
    files = sorted(out.iterdir())
    assert {ConceptDelta.load(path).concept.name for path in files} == set(names)
    code, said, _ = run("inspect", *files)
    assert code == 0
    assert all(name in said for name in names)
    first = {path: path.read_bytes() for path in files}
    book.write_text(json.dumps([{"name": "C++", "prompts": ["rocket"]}]))
    code, _, err = run(*train, "--resume")
    assert "C++: already made" in err
    assert {path: path.read_bytes() for path in out.iterdir()} == first


def test_interrupted_training_resumes_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    """Ctrl-C in mid-training: exit 130, a checkpoint and no delta; --resume ends with the bytes of an unbroken run."""
    (tmp_path / "book.yaml").write_text("concepts: [rocket, church]")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train: list[Any] = ["train", "demo", tmp_path / "book.yaml", "--only", "rocket", "--steps", 90, "--threshold", -1, "--batch", 1]
    train += ["--nearby", 0, "--no-thumbnail", "-o"]
    code, _, err = run(*train, whole)
    assert code == 0, err

    command = [sys.executable, "-m", "sepme.cli", *map(str, train), str(broken)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checkpoint = broken / "rocket.checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert [p.name for p in broken.iterdir()] == [checkpoint.name]

    code, _, err = run(*train, broken, "--resume")
    assert code == 0, err
    assert [p.name for p in broken.iterdir()] == ["rocket.safetensors"]
    assert (broken / "rocket.safetensors").read_bytes() == (whole / "rocket.safetensors").read_bytes()
