"""A book of deltas: whatever is left to do has the bytes of the whole run, and a checkpoint goes only when its deltas are saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import Interrupted
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.planner import Planner
from sepme.train import Job, Progress, TrainOptions, each, plan_options, train_book
from sepme.train.book import Group

NAMES = ("tree", "star", "house")
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in NAMES), preserve=("the moon",))
ORDINARY = ("a cat", "a big dog", "blue")
OPTIONS = TrainOptions(steps=4, batch=1, trajectories=1, threshold=-1e9, checkpoint_every=2)


@pytest.fixture(scope="module")
def host(make_host: Callable[..., DiffusersHost]) -> DiffusersHost:
    return make_host(torch.float32)


def job(host: Any, todo: Sequence[Group]) -> Job:
    return Job(Planner(host, BOOK, plan_options("subspace"), ORDINARY), host, OPTIONS, NAMES, todo)


def checkpoint(folder: Path) -> Callable[[str], Path]:
    return lambda name: folder / f"{name}.checkpoint.safetensors"


@pytest.fixture(scope="module")
def whole(host: DiffusersHost) -> dict[str, bytes]:
    """All concepts one by one, in memory."""
    made: dict[str, bytes] = {}
    started: list[tuple[str, ...]] = []
    train_book(
        job(host, each(NAMES)), lambda d: made.update({d.concept.name: d.to_bytes()}), on_start=lambda names: started.append(tuple(names))
    )
    assert started == [(n,) for n in NAMES]
    assert list(made) == list(NAMES)
    return made


def test_stopped_and_gone_on(host: DiffusersHost, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Stopped in the second concept: the first is saved, the second's state kept; what is left then has the bytes of the whole run."""
    made: dict[str, bytes] = {}
    place = checkpoint(tmp_path)

    def save(delta: ConceptDelta) -> None:
        assert place(delta.concept.name).exists()  # it may still be needed
        made[delta.concept.name] = delta.to_bytes()

    def stop(step: Progress) -> None:
        if (step.concept, step.step) == ("star", 3):
            raise Interrupted

    with pytest.raises(Interrupted):
        train_book(job(host, each(NAMES, place)), save, stop)
    assert list(made) == ["tree"]
    assert [p.name for p in tmp_path.iterdir()] == ["star.checkpoint.safetensors"]
    (tmp_path / ".star.checkpoint.safetensors.x.part").touch()  # of a process that was killed
    steps: list[int] = []
    train_book(job(host, each(NAMES[1:], place)), save, lambda s: steps.append(s.step) if s.concept == "star" else None)
    assert steps == [4]
    assert made == whole
    assert list(tmp_path.iterdir()) == []


def test_joint(host: DiffusersHost, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One group: both are saved before its checkpoint goes."""
    place, seen, made = tmp_path / "joint.safetensors", list[bool](), dict[str, bytes]()

    def save(delta: ConceptDelta) -> None:
        seen.append(place.exists())
        made[delta.concept.name] = delta.to_bytes()

    train_book(job(host, [Group(NAMES[:2], place)]), save)
    assert seen == [True, True]
    assert not place.exists()
    assert list(made) == list(NAMES[:2])
    assert all(made[n] != whole[n] for n in made)
