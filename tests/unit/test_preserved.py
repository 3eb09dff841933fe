"""What must not change: preserve lists and streamed preserve files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import (
    ORDINARY,
    HashedEncoder,
    angle,
    book_of,
    numbered_book,
    planner_of,
)

from sepme.errors import SepMEError
from sepme.model.protocols import Encoding
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import ratios
from sepme.plan.planner import Planner
from sepme.plan.preserved import PreserveFile
from sepme.plan.tokens import CHUNK


def write_prompts(path: Path, count: int) -> list[str]:
    prompts = [f"preserved {i}" for i in range(count)]
    path.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    return prompts


@pytest.mark.parametrize("mode", ["exact", "tolerance", "soft"])
def test_a_streamed_list_plans_as_one_in_memory(tmp_path: Path, mode: str) -> None:
    prompts = write_prompts(tmp_path / "preserved.txt", 4 if mode == "exact" else CHUNK + 44)
    streamed = planner_of(3, mode, preserve_file=str(tmp_path / "preserved.txt"))
    listed = planner_of(3, mode, preserve=tuple(prompts))
    torch.testing.assert_close(streamed._finder._fixed.gram, listed._finder._fixed.gram, rtol=1e-12, atol=1e-9)
    assert (streamed.prompts.preserved.count, streamed.prompts.preserved.digest) == (
        listed.prompts.preserved.count,
        listed.prompts.preserved.digest,
    )
    if mode == "tolerance":  # 300 prompts leave nothing below 0.03
        with pytest.raises(SepMEError, match="not even one concept fits"):
            streamed.plan("name 0")
        return
    a, b = streamed.plan("name 0"), listed.plan("name 0")
    assert angle(a.down.T, b.down.T) < 1e-6
    leaks = [s.certificate.leakage_linear["(preserved prompts)"] for s in (a, b)]
    assert leaks[0] == pytest.approx(leaks[1], abs=1e-5)
    assert leaks[0] > 0.05 if mode == "soft" else leaks[0] < 2e-3  # what rounding to bfloat16 leaves
    assert float(ratios(listed.prompts.preserved.listed.context, a.down).max()) <= a.gate  # type: ignore[union-attr]


def test_a_long_preserve_file_is_never_held_as_a_whole(tmp_path: Path) -> None:
    write_prompts(tmp_path / "preserved.txt", 20_000)
    encoder, seen = HashedEncoder(), list[tuple[str, int, int]]()
    p = Planner(
        encoder, numbered_book(2, preserve_file=str(tmp_path / "preserved.txt")), PlanOptions(mode="auto"), (), lambda *a: seen.append(a)
    )  # fmt: skip
    p.plan_all()
    assert p.prompts.preserved.count == 20_000
    assert p.mode == "soft"
    assert CHUNK <= encoder.peak <= 6 * CHUNK
    size = (tmp_path / "preserved.txt").stat().st_size
    assert ("Preserve file: reading", size, size) in seen
    assert ("Preserve file: gates", size, size) in seen


def test_a_bad_preserve_file_is_a_sentence(tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / "preserved.txt").write_bytes(content)
        list(PreserveFile(tmp_path / "preserved.txt").batches())

    with pytest.raises(SepMEError, match="cannot be read"):
        PreserveFile(tmp_path / "missing.txt")
    with pytest.raises(SepMEError, match="folder"):
        PreserveFile(tmp_path)
    with pytest.raises(SepMEError, match="is empty"):
        read(b"\n  \n")
    with pytest.raises(SepMEError, match="not a text file"):
        read(b"a cat\n\x89PNG\xff\n")
    with pytest.raises(SepMEError, match="not a text file"):
        read(b"a\0b\n")
    with pytest.raises(SepMEError, match="more than 2000 characters"):
        read(b"x" * 100_000)


def test_a_preserved_prompt_cannot_be_a_concepts(tmp_path: Path) -> None:
    (tmp_path / "preserved.txt").write_text("fog\nName  1\n", encoding="utf-8")
    with pytest.raises(SepMEError, match=r"'name 1' of concept 'name 1' reads the same .* 'Name  1'"):
        planner_of(2, "soft", preserve_file=str(tmp_path / "preserved.txt"))


def test_a_preserved_prompt_that_reads_the_same_is_refused(encoder: Any) -> None:
    """The texts differ, their tokens do not."""
    with pytest.raises(SepMEError, match=r"'a star' of concept 'star' reads the same .* preserved prompt 'A  star!'"):
        Planner(encoder, book_of(2, ["our logo", "A  star!"]), None, ORDINARY)


def test_it_is_refused_too_when_batches_round_differently(encoder: Any) -> None:
    """Encoders on several threads or a GPU give a prompt other last bits in another batch."""

    class Rounding:
        def encode(self, prompts: Sequence[str]) -> Encoding:
            encoding = encoder.encode(prompts)
            return encoding._replace(context=encoding.context * (1 + 1e-6 * len(prompts)))

    with pytest.raises(SepMEError, match="reads the same"):
        Planner(Rounding(), book_of(2, ["our logo", "A  star!", "one", "two"]), None, ORDINARY)
    Planner(Rounding(), book_of(2, ["our logo", "star of"]), None, ORDINARY)


def test_refusal_when_the_preserve_list_takes_all(encoder: Any) -> None:
    book = book_of(2, ["one thing", "two things", "three more things", "four", "five and six", "seven of those"])
    with pytest.raises(SepMEError, match="not even one concept fits beside the preserve list in mode exact"):
        Planner(encoder, book, PlanOptions(mode="exact"), ORDINARY).plan("star")
