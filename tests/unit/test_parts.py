"""Edits of the texts that a model is given beside the context: planned from their own encoders, in the same file, with the same toggles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planning import D_IN, OPTIONS, ORDINARY, HashedEncoder, book_of
from safetensors.torch import load_file, save_file

from sepme.apply.composition import Composition
from sepme.convert import known_to, reproject
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.verify import verify
from sepme.errors import SepMEError
from sepme.model.protocols import Encoding
from sepme.plan.gate import ratios
from sepme.plan.planner import Planner
from sepme.train import TrainOptions
from sepme.train.make import make_deltas


class Wider(HashedEncoder):
    """Another encoder: 12 channels more."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        encoding = super().encode(prompts)
        return encoding._replace(context=torch.cat([encoding.context.flip(-1), encoding.context[..., :12]], dim=-1))


class Both(HashedEncoder):
    """An encoder of a model that is given two more texts."""

    def __init__(self) -> None:
        super().__init__()
        self.others = {"t5": Wider(), "llama.7": HashedEncoder()}


@pytest.fixture(scope="module")
def deltas() -> tuple[ConceptDelta, ...]:
    planner = Planner(Both(), book_of(3), OPTIONS, ORDINARY)
    return tuple(make_deltas(planner, [name], None, TrainOptions(objective="closed-form", edit="context"))[0] for name in ("star", "heart"))


def test_a_part_is_the_edit_of_its_own_encoder(deltas: tuple[ConceptDelta, ...]) -> None:
    (alone,) = make_deltas(
        Planner(Wider(), book_of(3), OPTIONS, ORDINARY), ["star"], None, TrainOptions(objective="closed-form", edit="context")
    )
    part = deltas[0].parts["t5"]
    assert (part.d_in, part.gate, part.certificate) == (D_IN + 12, alone.gate, alone.certificate)
    assert torch.equal(part.down, alone.down)
    assert torch.equal(part.up["context"], alone.up["context"])
    assert alone.parts == {}


def test_round_trip(deltas: tuple[ConceptDelta, ...], tmp_path: Path) -> None:
    back = ConceptDelta.load(deltas[0].save(tmp_path / "star.safetensors"))
    assert list(back.parts) == ["llama.7", "t5"]
    assert replace(back, file="").to_bytes() == deltas[0].to_bytes()
    assert back.content_hash() != replace(back, parts={}).content_hash()


def test_every_text_is_verified(deltas: tuple[ConceptDelta, ...]) -> None:
    """A gate of a second text that lets others through shows; an encoder that does not make the text says what was not checked."""
    both = Both()
    held = verify(both, deltas)
    assert held.warnings == ()
    for check in held.checks:
        assert check.holds
        assert set(check.parts) == {"t5", "llama.7"}
        assert check.parts["t5"].own_min > check.parts["t5"].gate
        assert set(check.parts["t5"].leakage_linear) == set(check.leakage_linear)
    wide = replace(deltas[0], parts=dict(deltas[0].parts) | {"t5": replace(deltas[0].parts["t5"], gate=0.0)})
    (check,) = verify(both, [wide]).checks
    assert [check.holds, check.parts["t5"].holds, check.parts["llama.7"].holds] == [False, False, True]
    alone = verify(HashedEncoder(), deltas[:1])
    assert alone.holds
    assert alone.checks[0].parts == {}
    assert [w.split(" (")[0] for w in alone.warnings] == ["The edits of the text t5", "The edits of the text llama.7"]


def test_every_text_is_reprojected(deltas: tuple[ConceptDelta, ...]) -> None:
    """Each part spares what came later, along new directions of its own; one that cannot be made is refused, not left out."""
    book = known_to(deltas[:1], book_of(5))
    planner = Planner(Both(), book, OPTIONS, ORDINARY)
    new, late = reproject(planner, deltas[0], {}), book.concepts[-1]
    for text, encoder in Both().others.items():
        old, part = deltas[0].parts[text], new.parts[text]
        context = encoder.encode(late.prompts).context
        assert float(ratios(context, part.down).max()) < 0.1 * float(ratios(context, old.down).max())
        own = encoder.encode(deltas[0].concept.prompts).context
        moved = [Composition((replace(d, parts={}),)).edit_context(own, torch.ones(len(own), 1)) - own for d in (old, part)]
        assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.5
        assert part.certificate == planner.others[text].plan("star").certificate
    with pytest.raises(SepMEError, match="edits the text t5 too"):
        reproject(Planner(HashedEncoder(), book, OPTIONS, ORDINARY), deltas[0], {})


@pytest.mark.parametrize("damage", ["up.t5", "up.t5.scale", "down.t5", "down.pooled", "infinite", "narrow"])
def test_damaged_parts_are_refused(deltas: tuple[ConceptDelta, ...], tmp_path: Path, damage: str) -> None:
    tensors = load_file(deltas[0].save(tmp_path / "star.safetensors"))
    if damage == "infinite":
        tensors["up.t5.scale"] = torch.tensor(3e38)
    elif damage == "narrow":
        tensors["up.t5"] = tensors["up.t5"][1:].contiguous()
    elif damage == "down.pooled":
        tensors[damage] = tensors["down.t5"].clone()
    else:
        del tensors[damage]
    save_file(tensors, tmp_path / "damaged.safetensors", deltas[0].metadata())
    with pytest.raises(SepMEError, match="damaged"):
        ConceptDelta.load(tmp_path / "damaged.safetensors")


def test_toggles_are_the_concept_s(deltas: tuple[ConceptDelta, ...]) -> None:
    """In one batch of a second text: touched rows move as their concept's toggle says, all others keep their bits."""
    composition = Composition(deltas)
    tokens = Wider().encode(["star", "heart", "star", "circle"]).context
    strengths = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    edited = composition.edit_part("t5", tokens, strengths)
    assert [i for i in range(4) if not torch.equal(edited[i], tokens[i])] == [0, 1]
    assert composition.edit_part("t5", tokens, 0 * strengths) is tokens
    only = Composition((replace(deltas[0], parts={}), deltas[1]))
    assert torch.equal(only.edit_part("t5", tokens, strengths)[0], tokens[0])
    assert torch.equal(only.edit_part("t5", tokens, strengths)[1], edited[1])
