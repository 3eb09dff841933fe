"""Which row of a context has which strengths, from what each host knows: order, place, content."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepme.apply.row_strengths import chunked, row_strengths

DEFAULT = torch.tensor([0.25, 0.75])


def prompt(seed: int, tokens: int = 4) -> Tensor:
    return torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed))


def table(*first: float) -> Tensor:
    """Strengths of two concepts, told apart by the first."""
    return torch.tensor([[s, 0.5] for s in first])


CAT, DOG, FOX = (prompt(i) for i in range(3))
BATCH = torch.stack([CAT, DOG, FOX])
STRENGTHS = table(1, 2, 3)


def first(context: Tensor, **more: object) -> tuple[list[float], bool, int]:
    """The first concept's strength in every row, whether all rows are known, and where to look next."""
    match = row_strengths(context, STRENGTHS, DEFAULT, **more)  # type: ignore[arg-type]
    return match.strengths[:, 0].tolist(), match.known, match.next


def test_by_place_where_there_are_as_many_rows() -> None:
    """Whatever their content, and without a copy."""
    for context in (BATCH, BATCH * 2, BATCH.flip(0)):
        for prompts in (None, BATCH):
            assert row_strengths(context, STRENGTHS, DEFAULT, prompts).strengths is STRENGTHS


def test_strengths_of_every_row() -> None:
    for strengths in (torch.ones(2), torch.zeros(2)):
        for order in (None, ()):
            match = row_strengths(BATCH, strengths, DEFAULT, BATCH[:1], order)
            assert match.strengths is strengths
            assert match.known


def test_no_row_is_looked_for_where_all_have_the_default() -> None:
    match = row_strengths(BATCH[:2] + 1, DEFAULT.expand(3, -1), DEFAULT, BATCH)
    assert torch.equal(match.strengths, DEFAULT)
    assert match.known


def test_by_content() -> None:
    """Added, split, repeated and reordered rows."""
    assert first(BATCH[[2, 0]], prompts=BATCH)[:2] == ([3, 1], True)
    assert first(BATCH[1:2], prompts=BATCH)[:2] == ([2], True)
    assert first(BATCH.repeat(2, 1, 1), prompts=BATCH)[:2] == ([1, 2, 3, 1, 2, 3], True)
    assert first(BATCH.repeat_interleave(2, 0), prompts=BATCH)[:2] == ([1, 1, 2, 2, 3, 3], True)
    assert first(torch.stack([DOG, DOG * 2]), prompts=BATCH)[:2] == ([2, 0.25], False)
    assert first(BATCH.flip(0), prompts=BATCH, order=())[:2] == ([3, 2, 1], True)  # as many, but the host does not know their order


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_content_is_compared_in_the_contexts_type(dtype: torch.dtype) -> None:
    assert first(BATCH[[2, 0]].to(dtype), prompts=list(BATCH))[:2] == ([3, 1], True)


def test_prompts_of_several_lengths() -> None:
    """Hosts lengthen and shorten to one length: the common beginning decides."""
    prompts = [prompt(0, 4), prompt(1, 8), prompt(2, 4)]
    assert first(prompts[1][None], prompts=prompts)[:2] == ([2], True)
    assert first(torch.stack([torch.cat([p, p]) for p in (prompts[2], prompts[0])]), prompts=prompts)[:2] == ([3, 1], True)
    assert first(prompts[1][None, :4], prompts=prompts)[:2] == ([2], True)


def test_a_run_of_rows_is_preferred() -> None:
    """Prompts of the same tokens may differ in strengths."""
    same = torch.stack([CAT, DOG, CAT])
    assert first(same[1:], prompts=same) == ([2, 3], True, 0)
    assert first(same[:2], prompts=same) == ([1, 2], True, 2)
    assert first(torch.stack([CAT]), prompts=same) == ([1], True, 1)


def test_calls_one_after_the_other() -> None:
    """Each begins where the one before ended; a call that was left out, or one more, does not put the others out of step."""
    same = torch.stack([CAT, CAT, DOG])
    at, found = 0, []
    for context in (CAT, CAT, DOG, CAT, DOG, FOX, CAT):
        strengths, known, at = first(context[None], prompts=same, order=(), start=at)
        found.append((*strengths, known))
    assert found == [(1, True), (2, True), (3, True), (1, True), (3, True), (0.25, False), (1, True)]


def test_without_prompts() -> None:
    """Rows that are alike are so however they were split; others get the default, which is to be said."""
    match = row_strengths(BATCH[:2], table(7, 7, 7), DEFAULT)
    assert match.strengths.tolist() == [7, 0.5]
    assert match.known
    match = row_strengths(BATCH[:2], STRENGTHS, DEFAULT)
    assert match.strengths is DEFAULT
    assert not match.known


def test_order_decides() -> None:
    assert first(BATCH[:2], order=[2, 0], prompts=BATCH)[:2] == ([3, 1], True)
    assert first(BATCH, order=[2, 0], prompts=BATCH[:, :2])[0] == [1, 2, 3]  # of another number of rows: content


@pytest.mark.parametrize(
    ("rows", "kinds", "images", "expected"),
    [
        (4, [0, 1], 2, [0, 1, 2, 3]),
        (4, [1, 0], 2, [2, 3, 0, 1]),
        (3, [0, 0, 1], 1, [0, 0, 1]),  # AND
        (8, [1, 0], 2, [2, 3, 2, 3, 0, 1, 0, 1]),  # tiles
        (2, [0], 2, [0, 1]),
        (3, [0, 1], 2, []),
        (2, [0, 1], 2, []),
        (4, [], 2, []),
    ],
)
def test_chunks(rows: int, kinds: list[int], images: int, expected: list[int]) -> None:
    assert chunked(rows, kinds, images) == expected
