"""Prompts as token matrices: chunks, lengths, padding, and what is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from planning import OPTIONS, ORDINARY, angle, book_of

from sepme.concepts import Concept, ConceptBook
from sepme.errors import SepMEError
from sepme.model.protocols import Encoding
from sepme.plan import finder
from sepme.plan.directions import Mode, PlanOptions
from sepme.plan.gate import affordable, ordinary_prompts
from sepme.plan.planner import Planner
from sepme.plan.tokens import encode, present, token_rows


def test_encode_goes_in_chunks(encoder: Any) -> None:
    prompts = [f"prompt number {i}" for i in range(600)]
    before = len(encoder.calls)
    encoding = encode(encoder, prompts)
    assert [len(c) for c in encoder.calls[before:]] == [256, 256, 88]
    whole = encoder.encode(prompts)
    assert torch.equal(encoding.context, whole.context)
    assert torch.equal(encoding.mask, whole.mask)


def test_encode_repeats_short_rows(encoder: Any) -> None:
    """Hosts return longer rows for batches with a prompt of several 77-token chunks."""

    class Long:
        def __init__(self, times: int) -> None:
            self.times = times

        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = encoder.encode(prompts)
            repeat = self.times if "long" in prompts else 1
            context = torch.cat([encoding.context] * repeat, dim=1)
            return Encoding(context[:, : 12 * repeat if self.times == 2 else 18], torch.cat([encoding.mask] * repeat, dim=1))

    prompts = ["star"] * 256 + ["long"]
    encoding = encode(Long(2), prompts)
    assert encoding.context.shape == (257, 24, 48)
    assert torch.equal(encoding.context[0, 12:], encoding.context[0, :12])
    assert encoding.mask.shape == (257, 24)
    with pytest.raises(SepMEError, match="incompatible lengths"):
        encode(Long(3), prompts)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_from_the_encoder_is_refused(encoder: Any, value: float) -> None:
    class Broken:
        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = encoder.encode(prompts)
            for row, prompt in enumerate(prompts):
                if "moon" in prompt:
                    encoding.context[row, 2, 3] = value
            return encoding

    with pytest.raises(SepMEError, match="NaN or infinite"):
        Planner(Broken(), book_of(4), None, ORDINARY)
    assert Planner(Broken(), book_of(3), None, ORDINARY).plan("star").gate > 0


def test_padding_option(encoder: Any) -> None:
    """``none`` leaves tokens after the end token out of C and A."""
    book = book_of(2)
    alls, none = (Planner(encoder, book, PlanOptions(padding=p), ORDINARY) for p in ("all", "none"))
    encoding = encoder.encode(["star", "a star"])
    tokens, _ = alls.prompts.tokens("star")
    assert torch.equal(tokens, encoding.context.double().flatten(0, 1))
    tokens, _ = none.prompts.tokens("star")
    assert torch.equal(tokens, torch.cat([encoding.context[0, :3], encoding.context[1, :4]]).double())
    assert none.plan("star").certificate.null_dims > alls.plan("star").certificate.null_dims


class FreeLength:
    """The double encoder's tokens up to a prompt's end: as many as it has words, and two."""

    free_length = True

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, prompts: Sequence[str]) -> Encoding:
        encoding = self.encoder.encode(prompts)
        longest = int(encoding.mask.sum(1).max())
        return Encoding((encoding.context * encoding.mask[..., None])[:, :longest], encoding.mask[:, :longest])


def test_zeros_stand_for_tokens_that_a_prompt_lacks(encoder: Any) -> None:
    """Of any number of prompts, read in parts of different lengths, each keeps the tokens it has, and only those count."""
    prompts = ["star"] * 256 + ["a star of the very big city"]
    encoding = encode(FreeLength(encoder), prompts)
    assert encoding.context.shape == (257, 16, 48)  # filled up, not repeated
    assert present(encoding.context).sum(1).tolist() == [3] * 256 + [9]
    whole = encoder.encode(prompts)
    assert torch.equal(encoding.context[whole_mask(encoding)], whole.context[whole.mask])
    assert torch.equal(token_rows(encoding, "all"), whole.context[whole.mask].double())


def whole_mask(encoding: Encoding) -> torch.Tensor:
    assert torch.equal(encoding.mask, present(encoding.context))
    return encoding.mask


def test_a_plan_does_not_depend_on_how_far_prompts_are_filled_up(encoder: Any) -> None:
    free, filled = (Planner(e, book_of(3), OPTIONS, ORDINARY) for e in (FreeLength(encoder), Filled(encoder)))
    for name in ("star", "heart"):
        assert torch.equal(free.plan(name).down, filled.plan(name).down)
        assert free.plan(name).gate == filled.plan(name).gate
        assert free.plan(name).certificate == filled.plan(name).certificate


class Filled(FreeLength):
    """The same, always 48 tokens long."""

    def encode(self, prompts: Sequence[str]) -> Encoding:
        encoding = super().encode(prompts)
        missing = 48 - encoding.context.shape[1]
        fill = torch.nn.functional.pad
        return Encoding(fill(encoding.context, (0, 0, 0, missing)), fill(encoding.mask, (0, missing)))


def test_the_anchor_stands_from_the_left(encoder: Any) -> None:
    """Longer prompts meet its last token at their end, shorter ones its beginning."""
    book = ConceptBook((Concept("star", ("star", "a photo of a big red star"), "a moon"),))
    planner = Planner(FreeLength(encoder), book, OPTIONS, ORDINARY)
    rows, target = planner.prompts.tokens("star")
    moon = encoder.encode(["a moon"]).context[0, :4].double()
    assert rows.shape == target.shape == (3 + 9, 48)
    assert torch.equal(target[:3], moon[:3])
    assert torch.equal(target[3:], moon[[0, 1, 2, 3, 3, 3, 3, 3, 3]])


def test_sinks_take_no_part(encoder: Any) -> None:
    """A first token ten thousand times as loud, the same in every prompt, changes no direction, gate or certificate, and is not moved."""

    class Sink(FreeLength):
        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = super().encode(prompts)
            first = 1e4 * torch.eye(48)[:1].expand(len(prompts), 1, 48)
            context = torch.cat([first, encoding.context * (torch.arange(48) > 0)], dim=1)
            return Encoding(context, torch.nn.functional.pad(encoding.mask, (1, 0), value=True))

    class Quiet(FreeLength):
        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = super().encode(prompts)
            return encoding._replace(context=encoding.context * (torch.arange(48) > 0))

    loud, quiet = (Planner(e, book_of(3), OPTIONS, ORDINARY) for e in (Sink(encoder), Quiet(encoder)))
    for name in ("star", "circle", "heart"):
        assert angle(loud.plan(name).down.T.double(), quiet.plan(name).down.T.double()) < 1e-5
        assert loud.plan(name).gate == pytest.approx(quiet.plan(name).gate, rel=1e-4)
        assert loud.plan(name).certificate.kept_energy == pytest.approx(quiet.plan(name).certificate.kept_energy, rel=1e-5)
        assert float(loud.plan(name).down[:, 0].abs().max()) < 1e-12


@pytest.mark.parametrize("mode", ["exact", "tolerance", "soft"])
def test_wide_encoders_are_planned_in_the_span_of_their_rows(encoder: Any, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same directions, by way of a few rows instead of a Gram matrix of all channels."""
    wide = type(encoder)(400)
    options = replace(OPTIONS, mode=mode)
    dense = Planner(wide, book_of(4, ["our logo"]), options, ORDINARY)
    expected = dense.plan_all()
    monkeypatch.setattr(finder, "WIDE", 300)
    planner = Planner(wide, book_of(4, ["our logo"]), options, ORDINARY)
    span = planner._finder._span
    assert span.dims == (1 + 1 + 2 * 4) * 12
    for name, subspace in planner.plan_all().items():
        assert angle(subspace.down.T.double(), expected[name].down.T.double()) < 1e-6
        assert subspace.gate == pytest.approx(expected[name].gate, rel=1e-5)
        assert subspace.certificate.null_dims == expected[name].certificate.null_dims
    assert planner.null_space("star").shape[0] == 400 if mode != "soft" else True


def test_too_many_rows_for_a_wide_encoder_are_refused(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a Gram matrix is made that no memory holds; encoders that are not so wide take any number."""
    monkeypatch.setattr(finder, "WIDE", 40)
    planner = Planner(encoder, book_of(4), OPTIONS, ORDINARY)
    assert planner._finder._span.basis is None
    monkeypatch.setattr(finder, "WIDEST", 40)
    with pytest.raises(SepMEError, match="may have 48 tokens together, and these have more"):
        Planner(encoder, book_of(4), OPTIONS, ORDINARY)


def test_ordinary_prompts_are_as_many_as_can_be_afforded() -> None:
    """All for CLIP; fewer for encoders of many channels and tokens, each half a part of the whole's half."""
    everything = ordinary_prompts()
    assert affordable(torch.zeros(1, 77, 2048)) == everything
    some = affordable(torch.zeros(1, 256, 4096))
    assert len(some) == 128
    assert set(some[::2]) <= set(everything[::2])
    assert set(some[1::2]) <= set(everything[1::2])
    assert len(set(some)) == 128
