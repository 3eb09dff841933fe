"""The row gate and its certificate: every figure recomputed from the tokens of the double encoder."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning import (
    D_IN,
    HALVES,
    OPTIONS,
    ORDINARY,
    TOKENS,
    book_of,
)
from torch import Tensor

from sepme.concepts import Concept, ConceptBook, mentions
from sepme.model.protocols import Encoding
from sepme.plan.gate import leakage_matrix, ordinary_prompts, ratios, side_by_side, statistics
from sepme.plan.planner import Planner, Subspace


def test_gate_opens_for_its_own_prompts_only(world: SimpleNamespace, planned: dict[str, Subspace]) -> None:
    """Own prompts open it; known, preserved and empty prompts do not; also when the encoder runs in half precision."""
    for dtype in HALVES:
        encoder = world.Encoder(dtype=dtype)
        for name, subspace in planned.items():
            assert (ratios(encoder.encode([name, f"a {name}"]).context, subspace.down) > subspace.gate).all()
            shut = ["", "our logo", *(p for n in planned if n != name for p in (n, f"a {n}")), *ORDINARY[0::2]]
            assert (ratios(encoder.encode(shut).context, subspace.down) <= subspace.gate).all()


def test_certificate_is_what_tokens_say(encoder: Any, planned: dict[str, Subspace]) -> None:
    """Every figure recomputed from the double's tokens by plain loops."""

    def statistic(prompt: str, down: Tensor) -> list[float]:
        values = []
        for dtype in HALVES:
            c = encoder.encode([prompt]).context[0].to(dtype).double()
            values.append(max(float((t @ down.T.double()).norm() / t.norm()) for t in c))
        return values

    subspace = planned["star"]
    certificate, down = subspace.certificate, subspace.down
    groups = {"circle": ["circle", "a circle"], "heart": ["heart", "a heart"], "(empty prompt)": [""], "(preserved prompts)": ["our logo"]}
    worst = {n: max(v for p in prompts for v in statistic(p, down)) for n, prompts in groups.items()}
    assert certificate.leakage_linear == pytest.approx(worst, rel=1e-4)
    assert certificate.leakage_gated == dict.fromkeys(groups, 0.0)
    high = min(v for p in ("star", "a star") for v in statistic(p, down))
    low = max([*worst.values(), *(v for p in ORDINARY[0::2] for v in statistic(p, down))])
    assert certificate.gate_high == pytest.approx(high, rel=1e-4)
    assert certificate.gate_low == pytest.approx(low, rel=1e-4)
    assert low < subspace.gate < high
    assert certificate.gate_overlap == 0.0
    assert certificate.to_json()["gate_overlap"] == 0.0


def test_false_touches_are_measured_on_held_out_lines(encoder: Any) -> None:
    """Even lines calibrate, odd ones measure; lines with the concept's own words are left out of both, and shift nothing."""
    quiet = ["a cat", "big dog", "wind", "old river", "cat", "green soup"]
    loud = ["starlike_star_x", "the moonstar"]  # other words; the gate sees them only if their tokens say so
    ordinary = ["one star", *quiet, *loud]
    subspace = Planner(encoder, book_of(2), OPTIONS, ordinary).plan("star")
    held_out = [p for p in ordinary[1::2] if not mentions(p, "star")]
    touched = ratios(encoder.encode(held_out).context, subspace.down) > subspace.gate
    assert subspace.certificate.false_touch_rate == pytest.approx(float(touched.float().mean()))
    calibration = [p for p in ordinary[0::2] if not mentions(p, "star")]
    known = ["", "circle", "a circle", *calibration]
    low = max(float(ratios(encoder.encode(known).context.to(d), subspace.down).max()) for d in HALVES)
    assert subspace.certificate.gate_low == pytest.approx(low, rel=1e-5)


def test_held_out_prompts_that_pass_are_counted(encoder: Any) -> None:
    """Held-out lines that carry the concept without naming it: two of the three odd lines."""

    class Alias:
        """Reads 'sterne' as 'star'."""

        def encode(self, prompts: Sequence[str]) -> Encoding:
            return encoder.encode([p.replace("sterne", "star") for p in prompts])

    ordinary = ["a cat", "sterne", "wind", "a sterne", "old river", "big dog"]
    subspace = Planner(Alias(), book_of(2), OPTIONS, ordinary).plan("star")
    assert subspace.certificate.false_touch_rate == pytest.approx(2 / 3)
    turned = Planner(Alias(), book_of(2), OPTIONS, [*ordinary[1:], "a cat"]).plan("star")
    assert turned.certificate.gate_low > turned.certificate.gate_high
    assert turned.gate < turned.certificate.gate_high  # ordinary prompts are the weaker claim: its own still open it
    assert turned.certificate.gate_overlap == turned.certificate.gate_low - turned.certificate.gate_high


def test_overlap_is_reported(encoder: Any) -> None:
    """When another concept reads the same, known prompts come first, and the certificate says by how much they overlap."""

    class Alias:
        def encode(self, prompts: Sequence[str]) -> Encoding:
            return encoder.encode([p.replace("sterne", "star") for p in prompts])

    book = ConceptBook((Concept("star", ("star", "big star")), Concept("sterne", ("sterne",)), Concept("moon", ("moon",))))
    certificate = Planner(Alias(), book, OPTIONS, ORDINARY).plan("star").certificate
    assert certificate.gate_overlap > 0
    assert certificate.gate_overlap == certificate.gate_low - certificate.gate_high
    assert certificate.leakage_gated["sterne"] == 0.0


def test_without_a_corpus(encoder: Any) -> None:
    certificate = Planner(encoder, book_of(2), None, ()).plan("star").certificate
    assert certificate.false_touch_rate == 0.0
    assert certificate.gate_low == max(certificate.leakage_linear.values())


def test_leakage_matrix(encoder: Any, planned: dict[str, Subspace]) -> None:
    contexts = {n: encoder.encode([n, f"a {n}"]).context for n in planned}
    matrix = leakage_matrix({n: s.down for n, s in planned.items()}, contexts)
    assert matrix.shape == (3, 3)
    for i, subspace in enumerate(planned.values()):
        for j, context in enumerate(contexts.values()):
            assert matrix[i, j] == ratios(context, subspace.down).max()
            assert (matrix[i, j] > subspace.gate) == (i == j)


def test_statistics_of_many_deltas_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(6, TOKENS, D_IN, generator=generator)
    downs = [torch.linalg.qr(torch.randn(D_IN, k, generator=generator)).Q.T for k in (1, 3, 2)]
    reference = torch.stack([((context @ d.T).norm(dim=-1) / context.norm(dim=-1)).amax(dim=1) for d in downs], dim=1)
    torch.testing.assert_close(statistics(context, side_by_side(downs)), reference, rtol=1e-5, atol=1e-6)


def test_the_shipped_corpus() -> None:
    prompts = ordinary_prompts()
    assert len(prompts) >= 500
    assert len(set(prompts)) == len(prompts)
    assert all(p == p.strip() and "\n" not in p for p in prompts)
