"""Prompts as token matrices: chunks, lengths, padding, and what is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from planning import (
    ORDINARY,
    book_of,
)

from sepme.errors import SepMEError
from sepme.model.protocols import Encoding
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.plan.tokens import encode


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
