"""Baselines' losses against their equations, written out here a second time, in float64.

The reference shares with ours the draws, which are overheard at the denoiser, the directions D, and w before each step, read from the
checkpoint. ``W + ΔW`` is formed explicitly, and the objective is differentiated by all w at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call

from sepme.concepts import Concept, ConceptBook
from sepme.errors import SepMEError
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.concept_tokens import own_words
from sepme.plan.planner import Planner
from sepme.train import Progress, TrainOptions, make_delta, plan_options

Hosts = Callable[..., DiffusersHost]
RTOL = 1e-6
STEPS = 3
BOOK = ConceptBook((Concept("tree", ("tree", "a tree on a hill"), anchor="a house"), Concept("star", ("star",))), preserve=("the moon",))
BASELINES = ("esd", "sdd", "ablation", "fmn")


class Overheard:
    """The host, with every draw of x_t and t written down once."""

    def __init__(self, host: DiffusersHost) -> None:
        self.host, self.draws = host, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        if not self.draws or self.draws[-1][0] is not x_t:
            self.draws.append((x_t, t, []))
        self.draws[-1][2].append(context.detach().clone())
        return self.host.predict(x_t, t, context)


class Maps:
    """An attention processor of its own: plain attention, cross-attention maps recorded."""

    def __init__(self, store: list[Tensor]) -> None:
        self.store = store

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        # the modules are called through functional_call, so the substituted weights are theirs
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        probabilities = torch.softmax(torch.einsum("bqd,bkd->bqk", q, k) * attn.scale, dim=-1)
        if cross:
            self.store.append(probabilities.unflatten(0, (len(hidden_states), attn.heads)))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(probabilities @ v)))


def kv_parameters(host: DiffusersHost) -> dict[str, str]:
    by_module = {id(m): n for n, m in host.unet.named_modules()}
    layers = host.attention_layers()
    return {f"{name}.{p}": f"{by_module[id(getattr(layer, p))]}.weight" for name, layer in layers.items() for p in ("to_k", "to_v")}


def word_tokens(host: DiffusersHost, prompt: str, word: str) -> list[int]:
    """Positions of a word's tokens, by the tokenizer."""
    ids = host.pipe.tokenizer(prompt).input_ids
    own = host.pipe.tokenizer(word).input_ids[1:-1]
    return next(list(range(i, i + len(own))) for i in range(len(ids)) if ids[i : i + len(own)] == own)


def reference(
    objective: str, host: DiffusersHost, before: dict[str, Tensor], basis: Tensor | None, draw: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient by w of one step, from the equation."""
    x_t, t, contexts = draw
    names, theta = kv_parameters(host), {n: p.detach() for n, p in host.unet.named_parameters()}
    w = {n: v.clone().requires_grad_(True) for n, v in before.items()}
    own = contexts[-1]  # the pass with a graph comes last
    empty, anchor = (host.encode([p]).context.expand(len(own), -1, -1) for p in ("", "a house"))

    def edited(by: dict[str, Tensor]) -> dict[str, Tensor]:
        return theta | {p: theta[p] + (by[n] if basis is None else by[n] @ basis) for n, p in names.items()}

    def eps(parameters: dict[str, Tensor], c: Tensor) -> Tensor:
        return functional_call(host.unet, parameters, (x_t, t), {"encoder_hidden_states": c}).sample

    if objective == "fmn":
        store: list[Tensor] = []
        processors = host.unet.attn_processors
        host.unet.set_attn_processor({n: Maps(store) for n in processors})
        eps(edited(w), own)
        host.unet.set_attn_processor(processors)
        prompts = {p: host.encode([p]).context[0] for p in BOOK["tree"].prompts}
        total = 0.0
        for layer in store:
            for row, c in zip(layer, own, strict=True):
                prompt = next(p for p, e in prompts.items() if torch.equal(e, c))
                total = total + row[:, :, word_tokens(host, prompt, "tree")].pow(2).sum()
        loss = total / len(own)
    else:
        if objective == "esd":
            target = (1 + 1.5) * eps(theta, empty) - 1.5 * eps(theta, own)
        elif objective == "sdd":
            target = eps(edited(before), empty) if basis is None else eps(theta, empty)
        else:
            target = eps(theta, anchor)
        loss = (eps(edited(w), own) - target.detach()).pow(2).sum() / target.numel()
    gradients = torch.autograd.grad(loss, list(w.values()), allow_unused=True, materialize_grads=True)
    return float(loss.detach()), dict(zip(w, gradients, strict=True))


@pytest.mark.parametrize("mode", ["subspace", "unrestricted"])
@pytest.mark.parametrize("objective", BASELINES)
def test_gradients_follow_the_equations(objective: str, mode: str, make_host: Hosts, tmp_path: Path) -> None:
    host = make_host(torch.float64)
    planner = Planner(host, BOOK, plan_options(mode, **({"mode": "exact"} if mode == "subspace" else {})), ordinary=("a house", "red boat"))
    overheard, path = Overheard(host), tmp_path / "checkpoint.safetensors"
    states: list[dict[str, Tensor]] = []
    losses: list[float] = []

    def on_step(step: Progress) -> None:
        losses.append(step.loss)
        with safe_open(path, framework="pt") as file:
            states.append({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118

    options = TrainOptions.for_mode(
        objective=objective, mode=mode, steps=STEPS, batch=2, trajectories=3, checkpoint_every=1, source="trajectory", learning_rate=0.02,
        regularisation=0.0, guidance=1.5,
    )  # fmt: skip
    make_delta(planner, "tree", overheard, options, path, on_step)
    names = kv_parameters(host)
    basis = planner.plan("tree").down.double() if mode == "subspace" else None
    width = 64 if basis is None else len(basis)
    before = {n: torch.zeros(host.unet.get_parameter(p).shape[0], width, dtype=torch.float64) for n, p in names.items()}
    moment = {n: torch.zeros_like(w) for n, w in before.items()}
    assert len(states) == len(overheard.draws) == STEPS
    for state, loss, draw in zip(states, losses, overheard.draws, strict=True):
        expected, gradients = reference(objective, host, before, basis, draw)
        assert loss == pytest.approx(expected, rel=RTOL)
        scale = max(float(g.abs().max()) for g in gradients.values())
        assert scale > 0
        for n, g in gradients.items():
            got = (state[f"0.exp_avg.{n}"] - 0.9 * moment[n]) / 0.1
            assert float((got - g).abs().max()) <= RTOL * scale
            moment[n], before[n] = state[f"0.exp_avg.{n}"], state[f"0.w.{n}"]
    assert max(float(w.abs().max()) for w in before.values()) > 0.01  # later steps did not start from zero


@pytest.mark.parametrize("objective", BASELINES)
def test_passes_of_a_step(objective: str, make_host: Hosts) -> None:
    """One pass with a graph; frozen ones as the equation needs."""
    host = make_host()
    planner = Planner(host, BOOK, plan_options("subspace"), ordinary=("a house", "red boat"))
    overheard = Overheard(host)
    make_delta(planner, "tree", overheard, TrainOptions.for_mode(objective=objective, steps=2, batch=1, trajectories=2))
    assert [len(calls) for _, _, calls in overheard.draws] == [{"esd": 3, "sdd": 2, "ablation": 2, "fmn": 1}[objective]] * 2


@pytest.mark.parametrize("objective", BASELINES)
@pytest.mark.parametrize("mode", ["subspace", "paper", "unrestricted"])
def test_training_reduces_the_loss(objective: str, mode: str, make_host: Hosts) -> None:
    """In every parametrisation, on a tiny pipeline; the recipe in the file makes the same bytes again."""
    host = make_host()
    planner = Planner(host, BOOK, plan_options(mode), ordinary=("a house", "red boat"))
    rate = {"subspace": 0.05, "paper": 300.0, "unrestricted": 0.02}[mode]
    options = TrainOptions.for_mode(
        objective=objective, mode=mode, steps=25, batch=4, trajectories=2, source="trajectory", learning_rate=rate
    )
    delta = make_delta(planner, "tree", host, options)
    losses = delta.info["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:3]) * 5 / 3
    assert delta.info["objective"]["name"] == objective
    again = make_delta(planner, "tree", host, TrainOptions(**delta.info["recipe"]["train"]))
    assert again.to_bytes() == delta.to_bytes()


def test_pictures_of_the_anchor(make_host: Hosts) -> None:
    """Concept ablation as published: x_t is noised from what the frozen model draws of the anchor, beside any of the concept's prompts."""
    host = make_host()
    planner = Planner(host, BOOK, plan_options("unrestricted"), ordinary=())
    sampled: list[Tensor] = []

    class Watched(Overheard):
        def sample(self, context: Tensor, empty: Tensor, generator: Any, *extra: Any, **more: Any) -> Tensor:
            sampled.append(context)
            return self.host.sample(context, empty, generator, *extra, **more)

    overheard = Watched(host)
    options = TrainOptions.for_mode(
        objective="ablation", mode="unrestricted", steps=6, batch=2, trajectories=2, source="anchor", learning_rate=0.02
    )
    make_delta(planner, "tree", overheard, options)
    assert torch.equal(sampled[0], host.encode(["a house"] * 2).context)
    own = host.encode(BOOK["tree"].prompts).context
    beside = torch.cat([calls[-1] for _, _, calls in overheard.draws])
    assert all(any(torch.equal(row, c) for c in own) for row in beside)
    assert any(not torch.equal(row, beside[0]) for row in beside)


def test_own_words(make_host: Hosts) -> None:
    """The name's tokens wherever it stands, also in several; the whole prompt where it does not stand; never start, end, padding."""
    host = make_host()
    host.pipe.tokenizer.model_max_length = 8
    concept = Concept("big tree", ("big tree", "a Big Tree", "a house"))
    mask = host.encode(concept.prompts).mask
    words = own_words(host, concept, mask)
    for row, prompt in zip(words, concept.prompts, strict=True):
        expected = word_tokens(host, prompt, "big tree") if "tree" in prompt.casefold() else range(1, int(mask[2].sum()) - 1)
        expected = [i for i in expected if i < 7]
        assert row.nonzero().flatten().tolist() == list(expected)
        assert expected


def test_options() -> None:
    assert TrainOptions.for_mode(objective="esd").warm_start is False
    assert TrainOptions().warm_start is True
    assert TrainOptions.for_mode(objective="esd", warm_start=True).warm_start is True
    for wrong in ({"objective": "fmn", "values_only": True}, {"objective": "uce"}, {"source": "nowhere"}):
        with pytest.raises(SepMEError):
            TrainOptions.for_mode(**wrong)
