"""The flow transformer as a host: erased by its context, spared, attacked and measured as the embedded model is. Its weights are random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sepme.apply.composition import Composition
from sepme.concepts import Concept, ConceptBook
from sepme.demo.emoji.flow import LENGTH, build_flow
from sepme.demo.emoji.host import FlowHost
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.run import Run
from sepme.evaluate.suite import Suite
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta


@pytest.fixture(scope="module")
def host(demo_host: DiffusersHost) -> FlowHost:
    torch.manual_seed(7)
    model = build_flow().eval().requires_grad_(False)
    nn.init.normal_(model.norm_out.linear_2.weight, std=0.1)
    return FlowHost(model, demo_host)


def test_prompts_end_where_they_end(host: FlowHost) -> None:
    context, mask, pooled = host.encode(["", "a rocket by noto"])
    assert pooled is None
    assert context.shape[:2] == mask.shape == (2, LENGTH)
    assert torch.equal(context.ne(0).any(-1), mask)
    assert mask.sum(1).tolist() == [2, 6]
    assert torch.equal(context[1, :6], host.sibling.encode(["", "a rocket by noto"]).context[1, :6])


@pytest.mark.parametrize("objective", ["closed-form", "gcirs"])
def test_erased_spared_and_given_back(host: FlowHost, objective: str) -> None:
    book = ConceptBook((Concept("rocket", ("rocket", "a rocket"), "church"), Concept("openmoji", ("openmoji style",))), ("a picture",))
    options = TrainOptions(objective=objective, edit="context", steps=2, batch=1, trajectories=2)
    deltas = [make_delta(Planner(host, book), name, host, options) for name in ("rocket", "openmoji")]
    assert all(set(d.up) == {"context"} for d in deltas)
    prompts, seeds = ["a rocket", "a picture", "openmoji style", "a cat"], [1, 2, 3, 4]
    stock, erased, back = (
        host.generate(prompts, seeds, composition, toggles, steps=2, latents_only=True)
        for composition, toggles in (
            (None, None),
            (Composition(tuple(deltas)), {"rocket": 1.0, "openmoji": 0.0}),
            (Composition(tuple(deltas)), {"rocket": 0.0, "openmoji": 0.0}),
        )
    )
    assert torch.equal(stock, back)
    assert [torch.equal(a, b) for a, b in zip(stock, erased, strict=True)] == [False, True, True, True]


def test_the_evaluation_measures_it(host: FlowHost, tmp_path: Path) -> None:
    """Attacks too; there are no layers that a fine-tune could change, and no figure of one."""
    attack = {"concepts": 1, "steps": 1, "batch": 1, "tokens": 2, "rounds": 1, "candidates": 1}
    suite = replace(Suite.load("tiny"), methods=("sepme_closed_form_context",), parts=("methods",), images=1, attack=attack)
    run = Run(host, suite, tmp_path, classifier=EmbeddedClassifier())
    assert run.encoder.free_length  # scenes plan with what remembers its encodings
    metrics = run()
    found = metrics["methods"]["sepme_closed_form_context"]
    assert found["untouched_bit_identical"] == found["restored_bit_identical"] == 1
    assert {"attack_success", "attack_text_named_gate_aware"} <= found.keys()
    assert "resurgence_accuracy" not in found
    assert (tmp_path / "report.html").stat().st_size > 10_000
