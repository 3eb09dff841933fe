"""Mode paper against the equations of arXiv 2402.05947, written out here a second time, in float64.

The reference knows nothing of sepme.train: two parameter sets of one functional UNet, four rows of ε a draw, ``W + ΔW`` formed explicitly,
all increments active, one scalar objective differentiated by every w at once, Adam by its own formulas. It shares with ours the
null-space bases Sp (whose ``A Sp = 0`` is checked here too) and the draws, which are overheard at the denoiser.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call

from sepme.concepts import Concept, ConceptBook
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.planner import Planner
from sepme.train import Progress, TrainOptions, make_deltas, plan_options

RTOL = 1e-9
NAMES = ("tree", "star")
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in NAMES), preserve=("the moon",))


class Overheard:
    """The host, with every predict call written down."""

    def __init__(self, host: DiffusersHost) -> None:
        self.host, self.calls = host, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor, extra: Any = None) -> Tensor:
        self.calls.append((x_t, t, context.detach().clone()))
        return self.host.predict(x_t, t, context)


class Snapshots:
    """w, Adam's moments, losses and momenta after every step, read from the checkpoint files."""

    def __init__(self, path: Path) -> None:
        self.path, self.steps = path, []

    def __call__(self, step: Progress) -> None:
        if step.step <= len(self.steps):
            return
        with safe_open(self.path, framework="pt") as file:
            self.steps.append(({k: file.get_tensor(k) for k in file.keys()}, file.metadata()))  # noqa: SIM118


def kv_parameters(host: DiffusersHost) -> dict[str, str]:
    """Parameter names of cross-attention's to_k and to_v in the UNet, by the name that delta files use."""
    by_module = {id(m): n for n, m in host.unet.named_modules()}
    layers = host.attention_layers()
    return {f"{name}.{p}": f"{by_module[id(getattr(layer, p))]}.weight" for name, layer in layers.items() for p in ("to_k", "to_v")}


def reference(
    host: DiffusersHost, planner: Planner, calls: list[tuple[Tensor, Tensor, Tensor]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Training from the equations; one record a step."""
    unet = host.unet
    names = kv_parameters(host)
    theta = {n: p.detach() for n, p in unet.named_parameters()}
    empty = planner.prompts.empty.context
    sp = {i: planner.null_space(i) for i in NAMES}
    w = {(i, n): torch.zeros(theta[p].shape[0], sp[i].shape[1], dtype=torch.float64) for i in NAMES for n, p in names.items()}
    first = {key: torch.zeros_like(v) for key, v in w.items()}
    second = {key: torch.zeros_like(v) for key, v in w.items()}
    taken = dict.fromkeys(NAMES, 0)
    own: dict[str, float] = {}
    joint = None
    draws = iter(calls[2::3])  # three calls per concept and step with the same x_t and t; the third holds the concept's prompts
    records: list[dict[str, Any]] = []

    def representation(parameters: dict[str, Tensor], x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        both = torch.cat([c, empty.expand_as(c)])
        prediction = functional_call(unet, parameters, (torch.cat([x_t, x_t]), torch.cat([t, t])), {"encoder_hidden_states": both})
        with_concept, without = prediction.sample.chunk(2)
        return with_concept - without

    while len(records) < options["steps"]:
        late = len(records) >= options["min_steps"]
        active = [i for i in NAMES if not (late and own[i] <= options["threshold"])]
        if not active or (late and joint <= options["threshold"]):
            break
        for value in w.values():
            value.requires_grad_(True)
        edited = dict(theta)
        for n, p in names.items():  # Eq. 9-10
            edited[p] = theta[p] + sum(w[i, n] @ (options["beta"] * sp[i]).T for i in NAMES)
        losses = {}
        for i in active:
            x_t, t, c = next(draws)
            r_new, r_old = representation(edited, x_t, t, c), representation(theta, x_t, t, c)
            losses[i] = (r_new * r_old).sum() / r_old.numel()  # Eq. 2
        values = {i: float(loss.detach()) for i, loss in losses.items()}
        top = max(values.values())
        eta = {i: min(options["eta_cap"], top**2 / v**2) if options["eta_cap"] else 1.0 for i, v in values.items()}
        if options["regularise"] == "w":
            norm = sum(w[i, n].abs().sum() for i in active for n in names)
        else:
            norm = sum((w[i, n] @ (options["beta"] * sp[i]).T).abs().sum() for i in active for n in names)
        objective = sum(eta[i] * losses[i] for i in active) + 1e-6 * norm / len(names)  # Eq. 3 and 11
        keys = [key for key in w if key[0] in active]
        gradients = dict(zip(keys, torch.autograd.grad(objective, [w[key] for key in keys]), strict=True))
        for i in active:
            taken[i] += 1
        for key, g in gradients.items():  # Adam
            first[key] = 0.9 * first[key] + 0.1 * g
            second[key] = 0.999 * second[key] + 0.001 * g**2
            m, v = first[key] / (1 - 0.9 ** taken[key[0]]), second[key] / (1 - 0.999 ** taken[key[0]])
            w[key] = (w[key] - options["learning_rate"] * m / (v.sqrt() + 1e-8)).detach()
        w = {key: value.detach() for key, value in w.items()}
        for i, v in values.items():
            own[i] = 0.9 * own[i] + 0.1 * v if i in own else v
        total = sum(eta[i] * values[i] for i in active)
        joint = total if joint is None else 0.9 * joint + 0.1 * total
        records.append({"losses": values, "gradients": gradients, "w": dict(w), "own": dict(own), "joint": joint})
    return records


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to RTOL, relative to the largest entry."""
    assert ours.dtype == theirs.dtype == torch.float64
    error, scale = (ours - theirs).detach().abs().max(), theirs.detach().abs().max()
    assert float(error) <= RTOL * float(scale)


# β as published moves little in a few steps; larger ones reach the freezing of single concepts and the joint stop.
CASES: dict[str, dict[str, Any]] = {
    "published": {"steps": 11},
    "regularised increment": {"steps": 4, "beta": 1e-2, "regularise": "delta"},
    "one freezes first": {"steps": 20, "beta": 0.1, "min_steps": 4, "threshold": 0.0056},
    "joint stop": {"steps": 20, "beta": 0.3, "min_steps": 16, "threshold": 3e-4, "eta_cap": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_paper_mode_follows_the_equations(case: str, make_host: Callable[..., DiffusersHost], tmp_path: Path) -> None:
    host = make_host(torch.float64, heed=6)
    planner = Planner(host, BOOK, plan_options("paper"), ordinary=("a house", "red boat"))
    overheard, snapshots = Overheard(host), Snapshots(tmp_path / "checkpoint.safetensors")
    options = TrainOptions.for_mode(mode="paper", batch=2, trajectories=3, checkpoint_every=1, **CASES[case])
    make_deltas(planner, NAMES, overheard, options, snapshots.path, snapshots)
    settings = {k: getattr(options, k) for k in ("steps", "beta", "learning_rate", "threshold", "min_steps", "eta_cap", "regularise")}
    if case == "published":
        assert settings == {
            "steps": 11, "beta": 1e-4, "learning_rate": 0.1, "threshold": 0.0, "min_steps": 10, "eta_cap": 100.0, "regularise": "w"
        }  # fmt: skip
    theirs = reference(host, planner, overheard.calls, settings)
    if case == "one freezes first":
        assert len(theirs[-1]["losses"]) == 1
        assert len(theirs) < 20
    if case == "joint stop":
        assert len(theirs) == 16
        assert max(theirs[-1]["own"].values()) > options.threshold >= theirs[-1]["joint"]

    assert len(snapshots.steps) == len(theirs)  # the stopping step
    previous: dict[str, Tensor] = {}
    for (tensors, metadata), record in zip(snapshots.steps, theirs, strict=True):
        losses, momenta = floats(metadata["losses"]), floats(metadata["momenta"])
        assert momenta[0] == pytest.approx(record["joint"], rel=RTOL, abs=1e-12)
        for index, i in enumerate(NAMES):
            assert momenta[index + 1] == pytest.approx(record["own"][i], rel=RTOL, abs=1e-12)
            if i in record["losses"]:
                assert losses[index][-1] == pytest.approx(record["losses"][i], rel=RTOL, abs=1e-12)
            for n in kv_parameters(host):
                key = f"{index}.exp_avg.{n}"
                gradient = (tensors[key] - 0.9 * previous.get(key, torch.zeros_like(tensors[key]))) / 0.1
                if (i, n) in record["gradients"]:
                    close(gradient, record["gradients"][i, n])
                close(tensors[f"{index}.w.{n}"], record["w"][i, n])
        previous = tensors


def floats(text: str) -> list[Any]:
    """A checkpoint's numbers: JSON of hexadecimal floats."""

    def number(value: Any) -> Any:
        return [number(v) for v in value] if isinstance(value, list) else float.fromhex(value)

    return [number(v) for v in json.loads(text)]


def test_null_space_is_one(make_host: Callable[..., DiffusersHost]) -> None:
    """``A_i Sp_i = 0`` with d_in − r unit columns, A_i stacked here from the prompts."""
    host = make_host(torch.float64, heed=6)
    planner = Planner(host, BOOK, plan_options("paper"), ordinary=())
    for concept in BOOK.concepts:
        others = [p for c in BOOK.concepts if c is not concept for p in c.prompts]
        rows = host.encode(["", *BOOK.preserve, *others]).context.flatten(0, 1)
        sp = planner.null_space(concept.name)
        assert float((rows @ sp).abs().max()) < 1e-12
        assert sp.shape[1] == 64 - int(torch.linalg.matrix_rank(rows))
        torch.testing.assert_close(sp.T @ sp, torch.eye(sp.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
