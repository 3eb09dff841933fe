"""Nearby words on the embedded model: what is graded safe spares what nobody named, and opens for the concept beside anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from sepme import cli
from sepme.concepts import Concept, ConceptBook, mentions
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.verify import verify
from sepme.demo.emoji.captions import STYLE_PROMPTS, THING_PROMPTS, caption_of
from sepme.demo.emoji.data import BACKGROUND_NAMES
from sepme.demo.emoji.things import STYLES, THINGS, name_of
from sepme.errors import SepMEError
from sepme.hosts.diffusers import DiffusersHost
from sepme.model.protocols import Encoding
from sepme.model.words import WordTable
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import ordinary_prompts, ratios
from sepme.plan.nearby import COUNT, Nearby
from sepme.plan.planner import Planner
from sepme.plan.tally import Tally
from sepme.train import TrainOptions, again, make_delta
from sepme.train.again import made_again

COLOUR_NAMES = BACKGROUND_NAMES[1:4]
SOME = tuple(name_of(t) for t in THINGS[:50:7])  # star among them


class Remembering:
    """The embedded model's encoder, each prompt read once."""

    def __init__(self) -> None:
        self.host, self.read = DiffusersHost.load("demo"), dict[str, tuple[Tensor, Tensor]]()

    def words(self) -> WordTable:
        return self.host.words()

    def encode(self, prompts: Sequence[str]) -> Encoding:
        if new := [p for p in dict.fromkeys(prompts) if p not in self.read]:
            encoding = self.host.encode(new)
            self.read |= {p: (c, m) for p, c, m in zip(new, encoding.context, encoding.mask, strict=True)}
        contexts, masks = zip(*(self.read[p] for p in prompts), strict=True)
        return Encoding(torch.stack(contexts), torch.stack(masks))


@pytest.fixture(scope="module")
def encoder() -> Remembering:
    return Remembering()


def prompts_with(things: Sequence[str], styles: Sequence[str], grounds: Sequence[str]) -> list[str]:
    """Prompts of the world that hold one, two or three of these words."""
    found = [caption_of(t, s, which=i) for i, (s, t) in enumerate(product(styles, things))]
    found += [caption_of(t, "", g, i) for i, (g, t) in enumerate(product(grounds, things))]
    found += [caption_of(t, s, g, i) for i, (s, g, t) in enumerate(product(styles, grounds, things))]
    return found + [caption_of("", s, g, i) for i, (s, g) in enumerate(product(styles, grounds))]


def sets_of(name: str) -> tuple[list[str], list[str]]:
    """Prompts of everything but a word, and prompts that hold it."""
    kinds = SOME, STYLES[:4], COLOUR_NAMES
    others = [[w for w in kind if w != name] for kind in kinds]
    singles = [caption_of(t, which=i) for t in others[0] for i in range(len(THING_PROMPTS))]
    singles += [caption_of("", s, which=i) for s in STYLES if s != name for i in range(len(STYLE_PROMPTS))]
    own = prompts_with(*((name,) if name in kind else kind for kind in kinds))
    return singles + prompts_with(*others), [p for p in own if mentions(p, name)]


def share_over(encoder: Remembering, prompts: Sequence[str], down: Tensor, gate: float) -> float:
    return float((ratios(encoder.encode(prompts).context, down) > gate).float().mean())


def test_what_is_graded_safe_is_safe(encoder: Remembering) -> None:
    """The bars: at most one in a hundred of the world's other prompts change, and of the concept's own slip through."""
    grades: list[str] = []
    names = ("car", "noto", "blob")
    for name in names:
        planned = Planner(encoder, ConceptBook((Concept(name),)), PlanOptions(nearby=COUNT), ordinary_prompts()[::3]).plan(name)
        grade = planned.certificate.grade(planned.gate)
        grades.append(grade)
        others, own = sets_of(name)
        assert share_over(encoder, others, planned.down, planned.gate) <= 0.01, name
        if grade == "good":
            assert 1 - share_over(encoder, own, planned.down, planned.gate) <= 0.01, name
    assert grades.count("good") == 2
    assert grades[names.index("car")] == "poor"  # it misses a third of its own prompts


def test_what_was_not_named_is_found_and_spared(encoder: Remembering, tmp_path: Path) -> None:
    """Without nearby words many other prompts change: said when it is measured, and mended; the file that was read stays."""
    book = ConceptBook((Concept("noto", ("noto style",)),))
    options = TrainOptions.for_mode(objective="closed-form", edit="context")
    old = make_delta(Planner(encoder, book), "noto", None, options)
    others, own = sets_of("noto")
    assert share_over(encoder, others, old.down, old.gate) > 0.1
    assert old.certificate.collateral is None
    assert old.verdict == "Nearly safe by known and ordinary prompts; nearby words were not measured."
    (check,) = verify(encoder, [old], nearby=COUNT).checks
    assert check.collateral is not None
    assert check.collateral.worst
    assert check.verdict.startswith("Not safe: ")
    assert "add them to the preserve list" in check.verdict
    new = made_again(encoder, None, old, check.collateral.worst)
    assert set(check.collateral.worst) <= set(new.preserve.prompts)
    assert share_over(encoder, others, new.down, new.gate) <= 0.01
    assert share_over(encoder, own, new.down, new.gate) >= 0.99
    assert new.certificate.collateral is not None
    assert new.certificate.collateral.share < check.collateral.share / 10
    loaded = ConceptDelta.load(new.save(tmp_path / "noto.safetensors"))
    assert (loaded.certificate, loaded.verdict) == (new.certificate, new.verdict)
    assert loaded.info["nearby"]["words"] >= 200
    assert made_again(encoder, None, old, check.collateral.worst).to_bytes() == new.to_bytes()


def test_what_cannot_be_made_again(encoder: Remembering) -> None:
    planner = Planner(encoder, ConceptBook((Concept("star", ("star",)),)), ordinary=("a cat",))
    delta = make_delta(planner, "star", None, TrainOptions.for_mode(objective="closed-form", edit="context"))
    for recipe in ({}, {"import": "0123"}, dict(delta.recipe.data) | {"pictures": {}}):
        with pytest.raises(SepMEError, match="with these words on its preserve list: tulip"):
            made_again(encoder, None, replace(delta, info=dict(delta.info) | {"recipe": recipe}), ["tulip"])


def test_words(encoder: Remembering) -> None:
    """None of the concept's, its plural's or its other prompts' words is near; what the user preserves is; other prompts are held out."""
    book = ConceptBook((Concept("star", ("star", "a tulip of banana")), Concept("blob")), ("banana", "a red cat"))
    found = Nearby.of(encoder, book, COUNT)
    assert {"moon", "dog", "banana"} <= set(found.words)
    assert not {"star", "tulip", "blob"} & set(found.words)
    planned = {*found.prompts, *(p for b in found.beside.values() for p in b.calibration)}
    held = [p for prompts in found.held_out.values() for p in prompts] + [p for b in found.beside.values() for p in b.held_out]
    assert not planned & set(held)
    assert not {p for c in book.concepts for p in c.prompts} & {*planned, *held}
    few = Nearby.of(encoder, book, 40)
    assert len(few.words) == 39  # one of the forty means star
    assert "moon" in few.words
    assert Nearby.of(encoder, book, 40) == few
    assert Nearby.of(encoder, book, 0) == Nearby()


def test_words_that_leave_no_room_only_calibrate(encoder: Remembering) -> None:
    """In mode exact nothing is left beside all the words of this tokenizer: the directions are those without them, the gate spares them."""
    book = ConceptBook((Concept("star", ("star", "a star")), Concept("tulip", ("tulip", "a tulip"))))
    plain, nearby = (Planner(encoder, book, PlanOptions(mode="exact", nearby=n), ordinary_prompts()[:40]).plan("star") for n in (0, 100))
    assert torch.equal(plain.down, nearby.down)
    assert plain.certificate.collateral is None
    assert nearby.certificate.collateral is not None
    strict = PlanOptions(mode="exact", nearby=100, min_kept_energy=0.9)
    with pytest.raises(SepMEError, match="No room is left for 'star'"):
        Planner(encoder, book, strict, ()).plan("star")


def test_what_changes_is_drawn_and_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red without nearby words changes some: pictures of them; two files of one concept are not made again into one."""
    (tmp_path / "book.yaml").write_text("concepts: [{name: red, prompts: [red, a red picture]}]", encoding="utf-8")
    run, made = CliRunner().invoke, tmp_path / "made" / "red.safetensors"
    command = ["train", "demo", str(tmp_path / "book.yaml"), "-o", str(made.parent), "--nearby", "0", "--objective", "closed-form"]
    assert run(cli.app, command).exit_code == 0
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(made.read_bytes())
    assert run(cli.app, ["verify", "demo", str(made), "--nearby", "40", "--draw", str(tmp_path / "drawn")]).exit_code == 0
    with Image.open(tmp_path / "drawn" / "red-nearby.png") as picture:
        assert len(set(picture.convert("RGB").getdata())) > 100
    refused = run(cli.app, ["verify", "demo", str(made), str(twin), "--fix", "--nearby", "4", "-o", str(tmp_path / "fixed")])
    assert isinstance(refused.exception, SepMEError)
    assert "hold the same concept" in str(refused.exception)
    assert not (tmp_path / "fixed").exists()
    worse = SimpleNamespace(certificate=SimpleNamespace(collateral=Tally(1, 1), misses=Tally(1, 1)), verdict="Not safe: all of it")
    monkeypatch.setattr(again, "made_again", lambda *given: worse)
    done = run(cli.app, ["verify", "demo", str(made), "--fix", "--nearby", "4", "-o", str(tmp_path / "fixed"), "--json"])
    assert json.loads(done.stdout)["fixed"] == [
        "red would be no better with these words preserved, so nothing was written (Not safe: all of it)"
    ]
    assert not list(tmp_path.glob("fixed/*"))
