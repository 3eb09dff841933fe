"""Training on a real (tiny) pipeline: the equation, the momentum stop, byte-equal results, resuming, and a model left as found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import Interrupted, SepMEError
from sepme.model.layers import kv_fingerprint, projections, weights
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import Progress, TrainOptions, make_delta
from sepme.train.objectives import Step
from sepme.train.objectives.closed_form import solve
from sepme.train.objectives.gcirs import GCiRs

ORDINARY = ("a cat", "a big dog", "big house", "a red tree", "a photo of a dog", "blue")
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in ("star", "circle")), ("a photo of a house",))
QUICK: dict[str, Any] = {"steps": 12, "batch": 2, "trajectories": 3, "threshold": -1e9, "warm_start": False}
TRAJECTORY = 25  # passes of the frozen model before the first step


@pytest.fixture(scope="module")
def planner(host: Any) -> Planner:
    return Planner(host, BOOK, PlanOptions(mode="exact", max_rank=4, energy=0.999), ORDINARY)


@pytest.fixture(scope="module")
def quick(planner: Planner, host: Any) -> tuple[ConceptDelta, list[Progress]]:
    """Twelve uninterrupted steps."""
    steps: list[Progress] = []
    return make_delta(planner, "star", host, TrainOptions(**QUICK), on_step=steps.append), steps


def merged(make_host: Callable[..., Any], up: dict[str, Tensor], down: Tensor) -> Any:
    """A fresh pipeline with weights W + Y Dᵀ."""
    host = make_host()
    for name, module in projections(host.attention_layers()).items():
        module.weight.data += up[name] @ down
    return host


def draws(planner: Planner, host: Any, options: TrainOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, contexts and empty contexts of the first step, drawn as documented: seed + 1 for the runs, seed for the steps."""
    contexts, empty = planner.prompts.encodings["star"].context, planner.prompts.empty.context
    generator = torch.Generator().manual_seed(options.seed + 1)
    runs = torch.randint(len(contexts), (options.trajectories,), generator=generator)
    with torch.no_grad():
        points, times = host.trajectory(contexts[runs], empty.expand(len(runs), -1, -1), generator)
    generator = torch.Generator().manual_seed(options.seed)
    run = torch.randint(len(runs), (options.batch,), generator=generator)
    at = torch.randint(len(times), (options.batch,), generator=generator)
    return points[at, run], times[at], contexts[runs[run]], empty.expand(options.batch, -1, -1)


# --- the objective


def test_loss_is_equation_2(planner: Planner, host: Any, make_host: Callable[..., Any]) -> None:
    """Avg(r(c; θ+Δθ) ⊙ r(c; θ)) with all four passes, Δθ merged into a second model; three passes give the same."""
    subspace = planner.plan("star")
    generator = torch.Generator().manual_seed(0)
    up = {n: 0.3 * torch.randn(w.shape[0], 4, generator=generator) for n, w in weights(host.attention_layers()).items()}
    changed = merged(make_host, up, subspace.down)
    x, t, context, empty = draws(planner, host, TrainOptions(**QUICK))
    with torch.no_grad():
        frozen, erased = (lambda c, h=h: h.predict(x, t, c) for h in (host, changed))
        loss = GCiRs(TrainOptions()).loss(Step(frozen, erased, None, context, empty, empty))
        r_changed = changed.predict(x, t, context) - changed.predict(x, t, empty)
        r = host.predict(x, t, context) - host.predict(x, t, empty)
        assert (r_changed - r).abs().max() > 0.1 * r.abs().max()
        assert float(loss) == pytest.approx(
            float(sum(a * b for a, b in zip(r_changed.flatten(), r.flatten(), strict=True)) / r.numel()), rel=1e-4
        )


def test_first_loss_is_the_mean_square_of_r(planner: Planner, host: Any, quick: tuple[ConceptDelta, list[Progress]]) -> None:
    """Y is zero at the start, so L_cor = Avg(r ⊙ r) > 0 at the points that the seeds name."""
    x, t, context, empty = draws(planner, host, TrainOptions(**QUICK))
    with torch.no_grad():
        r = host.predict(x, t, context) - host.predict(x, t, empty)
    assert quick[1][0].loss == pytest.approx(float((r * r).mean()), rel=1e-5)
    assert quick[1][0].loss > 0


def test_training_decorrelates(planner: Planner, host: Any, make_host: Callable[..., Any]) -> None:
    """The loss falls to zero and training stops there; measured again with merged weights at points never trained on."""
    steps: list[Progress] = []
    options = TrainOptions(steps=300, batch=4, trajectories=4, warm_start=False)
    delta = make_delta(planner, "star", host, options, on_step=steps.append)
    assert options.min_steps <= len(steps) < 300
    assert steps[-1].momentum <= 0 < steps[0].loss
    changed = merged(make_host, {n: delta.up_factor(n) for n in delta.up}, delta.down)
    x, t, context, empty = draws(planner, host, TrainOptions(batch=32, trajectories=16, seed=77))
    with torch.no_grad():
        r = host.predict(x, t, context) - host.predict(x, t, empty)
        after = (changed.predict(x, t, context) - host.predict(x, t, empty)) * r
        assert after.mean() < 0.3 * (r * r).mean()
        # the other concept, without the gate: A D = 0 is all that protects it
        circle = planner.prompts.encodings["circle"].context[:1].expand(32, -1, -1)
        drift = (changed.predict(x, t, circle) - host.predict(x, t, circle)).abs().max()
        assert drift <= 1e-4 * (changed.predict(x, t, context) - host.predict(x, t, context)).abs().max()


# --- the momentum stop


def test_momentum_recursion(quick: tuple[ConceptDelta, list[Progress]]) -> None:
    """L_mom starts at the first loss; then α L_mom + (1 − α) L."""
    steps = quick[1]
    assert [s.step for s in steps] == list(range(1, 13))
    expected = steps[0].loss
    for step in steps:
        if step.step > 1:
            expected = 0.9 * expected + 0.1 * step.loss
        assert step.momentum == pytest.approx(expected, rel=1e-12)
        assert (step.concept, step.steps) == ("star", 12)
    assert quick[0].info["losses"] == [round(s.loss, 8) for s in steps]


@pytest.mark.parametrize(("min_steps", "expected"), [(10, 10), (3, 3), (40, 12)])
def test_never_stops_before_min_steps(planner: Planner, host: Any, min_steps: int, expected: int) -> None:
    """With a threshold that every loss meets: at min_steps, or at the last step if that comes first."""
    options = TrainOptions(**QUICK | {"threshold": 1e9, "min_steps": min_steps})
    assert len(make_delta(planner, "star", host, options).info["losses"]) == expected


def test_stops_at_the_first_momentum_under_the_threshold(planner: Planner, host: Any, quick: tuple[ConceptDelta, list[Progress]]) -> None:
    """τ between two recorded values of L_mom."""
    momenta = [s.momentum for s in quick[1]]
    threshold = sorted(momenta[4:])[3]
    expected = next(i + 1 for i, m in enumerate(momenta) if i + 1 >= 4 and m <= threshold)
    assert 4 <= expected < 12
    delta = make_delta(planner, "star", host, TrainOptions(**QUICK | {"threshold": threshold, "min_steps": 4}))
    assert len(delta.info["losses"]) == expected
    assert delta.info["objective"]["steps"] == expected
    assert delta.info["losses"] == quick[0].info["losses"][:expected]


# --- bytes


def test_same_recipe_same_bytes(
    planner: Planner, host: Any, make_host: Callable[..., Any], quick: tuple[ConceptDelta, list[Progress]]
) -> None:
    """Also in a model loaded again, and from nothing but the recipe in the file; the global random state plays no part."""
    first = quick[0].to_bytes()
    torch.manual_seed(123)
    assert make_delta(planner, "STAR", host, TrainOptions(**QUICK)).to_bytes() == first
    recipe, again = quick[0].info["recipe"], make_host()
    assert recipe["threads"] == torch.get_num_threads()
    replanned = Planner(again, ConceptBook.parse(recipe["book"]), PlanOptions(**recipe["plan"]), ORDINARY)
    assert make_delta(replanned, recipe["concept"], again, TrainOptions(**recipe["train"])).to_bytes() == first
    other = make_delta(planner, "star", host, TrainOptions(**QUICK | {"seed": 1}))
    assert other.content_hash() != quick[0].content_hash()


def stop_at(step: int, error: type[BaseException] = Interrupted) -> Callable[[Progress], None]:
    def check(progress: Progress) -> None:
        if progress.step == step:
            raise error

    return check


@pytest.mark.parametrize(("at", "warm"), [(1, False), (4, False), (7, True), (12, False)])
def test_interrupt_and_resume(planner: Planner, host: Any, tmp_path: Path, at: int, warm: bool) -> None:
    """Stopped after any step and continued: the bytes of the uninterrupted run, and only the missing steps are made."""
    checkpoint, options = tmp_path / "star.checkpoint.safetensors", TrainOptions(**QUICK | {"checkpoint_every": 4, "warm_start": warm})
    reference = make_delta(planner, "star", host, options)
    with pytest.raises(Interrupted):
        make_delta(planner, "star", host, options, checkpoint, stop_at(at))
    assert checkpoint.exists()
    steps: list[Progress] = []
    assert make_delta(planner, "star", host, options, checkpoint, steps.append).to_bytes() == reference.to_bytes()
    assert [s.step for s in steps] == list(range(at + 1, 13))


def test_resume_after_a_crash(planner: Planner, host: Any, tmp_path: Path) -> None:
    """No farewell checkpoint: it goes on from the last regular one. Several interruptions in one training."""
    checkpoint, options = tmp_path / "c.safetensors", TrainOptions(**QUICK | {"checkpoint_every": 4})
    reference = make_delta(planner, "star", host, options)
    with pytest.raises(ZeroDivisionError):
        make_delta(planner, "star", host, options, checkpoint, stop_at(7, ZeroDivisionError))
    with pytest.raises(Interrupted):
        make_delta(planner, "star", host, options, checkpoint, stop_at(6))
    steps: list[Progress] = []
    assert make_delta(planner, "star", host, options, checkpoint, steps.append).to_bytes() == reference.to_bytes()
    assert steps[0].step == 7
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_another_recipes_checkpoint_is_ignored(
    planner: Planner, host: Any, quick: tuple[ConceptDelta, list[Progress]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        make_delta(planner, "star", host, TrainOptions(**QUICK | {"seed": 5}), checkpoint, stop_at(5))
    steps: list[Progress] = []
    assert make_delta(planner, "star", host, TrainOptions(**QUICK), checkpoint, steps.append).to_bytes() == quick[0].to_bytes()
    assert len(steps) == 12


def test_damaged_checkpoints(planner: Planner, host: Any, tmp_path: Path) -> None:
    """Cut anywhere, or a bit turned in a header field or a tensor."""
    checkpoint, options = tmp_path / "c.safetensors", TrainOptions(**QUICK)
    with pytest.raises(Interrupted):
        make_delta(planner, "star", host, options, checkpoint, stop_at(5))
    whole = checkpoint.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    turned = [header + 3, (header + len(whole)) // 2, len(whole) - 1, whole.index(b"losses") + 12, whole.index(b"exp_avg.")]
    damaged = [whole[:cut] for cut in (0, 4, 8, header - 1, header, header + 100, len(whole) - 1)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in turned]
    for data in damaged:
        checkpoint.write_bytes(data)
        with pytest.raises(SepMEError, match=r"The checkpoint .*c\.safetensors is damaged; delete it and train again\."):
            make_delta(planner, "star", host, options, checkpoint)
    checkpoint.write_bytes(whole)
    assert make_delta(planner, "star", host, options, checkpoint).info["objective"]["steps"] == 12


# --- the model


def test_the_model_is_left_as_found(planner: Planner, host: Any, make_host: Callable[..., Any], tmp_path: Path) -> None:
    """Parameters bit-equal, nothing frozen or thawed, no attribute added; after training, interruption and divergence."""
    before = [[(k, id(v)) for k, v in m.__dict__.items()] for m in host.unet.modules()]
    reference = dict(make_host().unet.named_parameters())
    make_delta(planner, "star", host, TrainOptions(**QUICK))
    with pytest.raises(Interrupted):
        make_delta(planner, "star", host, TrainOptions(**QUICK), tmp_path / "c.safetensors", stop_at(2))
    with pytest.raises(SepMEError, match="'star' diverged at step 1; lower the learning rate"):
        make_delta(planner, "star", host, TrainOptions(**QUICK | {"learning_rate": 1e30}))
    assert [[(k, id(v)) for k, v in m.__dict__.items()] for m in host.unet.modules()] == before
    for name, parameter in host.unet.named_parameters():
        assert torch.equal(parameter, reference[name])
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_three_passes_a_step_one_with_a_graph(planner: Planner, host: Any) -> None:
    passes: list[bool] = []
    handle = host.unet.register_forward_pre_hook(lambda module, args: passes.append(torch.is_grad_enabled()))
    try:
        make_delta(planner, "star", host, TrainOptions(**QUICK))
        assert len(passes) == TRAJECTORY + 3 * 12
        assert sum(passes[:TRAJECTORY]) == 0
        assert [sum(passes[i : i + 3]) for i in range(TRAJECTORY, len(passes), 3)] == [1] * 12
        passes.clear()
        make_delta(planner, "star", host, TrainOptions.for_mode(objective="closed-form"))
        assert passes == []
    finally:
        handle.remove()


# --- options


def test_closed_form(planner: Planner, host: Any) -> None:
    steps: list[Progress] = []
    delta = make_delta(planner, "star", host, TrainOptions.for_mode(objective="closed-form"), on_step=steps.append)
    assert steps == delta.info["losses"] == []
    tokens, target = planner.prompts.tokens("star")
    expected = solve(weights(host.attention_layers()), tokens, target, delta.down)
    for name, y in expected.items():
        assert (delta.up_factor(name) - y).abs().max() <= 2**-11 * y.abs().max()


def test_warm_start(planner: Planner, host: Any, make_host: Callable[..., Any]) -> None:
    """The first loss is that of the closed form, at any β; values only when asked."""
    tokens, target = planner.prompts.tokens("star")
    subspace = planner.plan("star")
    x, t, context, empty = draws(planner, host, TrainOptions(**QUICK))
    for options in ({}, {"beta": 0.125}, {"values_only": True}):
        steps: list[Progress] = []
        made = make_delta(planner, "star", host, TrainOptions(**QUICK | {"steps": 1, "warm_start": True} | options), on_step=steps.append)
        start = solve(weights(host.attention_layers()), tokens, target, subspace.down, values_only="values_only" in options)
        changed = merged(make_host, start, subspace.down)
        with torch.no_grad():
            uncond = host.predict(x, t, empty)
            expected = ((changed.predict(x, t, context) - uncond) * (host.predict(x, t, context) - uncond)).mean()
        assert steps[0].loss == pytest.approx(float(expected), rel=1e-3)
        if "values_only" in options:
            assert all(made.up_factor(n).eq(0).all() == n.endswith("to_k") for n in made.up)


def test_values_only_leaves_keys(planner: Planner, host: Any, quick: tuple[ConceptDelta, list[Progress]]) -> None:
    delta = make_delta(planner, "star", host, TrainOptions(**QUICK | {"values_only": True}))
    assert delta.shapes == quick[0].shapes
    assert all(delta.up_factor(n).eq(0).all() == n.endswith("to_k") for n in delta.up)
    assert not any(quick[0].up_factor(n).eq(0).all() for n in quick[0].up)


def test_beta_is_folded_in(planner: Planner, host: Any) -> None:
    """Adam's first step on w is lr g / (g + ε) whatever β is, and g is proportional to β; Y is β times that."""
    rate, epsilon, gradient = 0.5, 1e-8, None
    for beta in (1.0, 0.25):
        delta = make_delta(planner, "star", host, TrainOptions(**QUICK | {"steps": 1, "beta": beta, "learning_rate": rate}))
        step = max(float(delta.up_factor(n).abs().max()) for n in delta.up) / beta
        gradient = gradient or epsilon * step / (rate - step)
        assert gradient > 100 * epsilon
        assert step == pytest.approx(rate * beta * gradient / (beta * gradient + epsilon), rel=1e-4)
        assert delta.info["objective"]["beta"] == beta


def test_regularisation_pulls_to_zero(planner: Planner, host: Any, quick: tuple[ConceptDelta, list[Progress]]) -> None:
    """λ‖w‖_1 / M: a large λ keeps Y small, without it Y grows."""

    def size(delta: ConceptDelta) -> float:
        return sum(float(delta.up_factor(n).abs().sum()) for n in delta.up)

    strong = make_delta(planner, "star", host, TrainOptions(**QUICK | {"regularisation": 1e3}))
    assert size(strong) < 0.5 * size(quick[0])


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "magic"},
        {"steps": 0},
        {"learning_rate": 0},
        {"batch": 0},
        {"beta": 0},
        {"trajectories": 0},
        {"checkpoint_every": 0},
        {"momentum": 1.0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(SepMEError):
        TrainOptions.for_mode(**options)


def test_what_a_delta_says_of_itself(planner: Planner, host: Any, quick: tuple[ConceptDelta, list[Progress]], tmp_path: Path) -> None:
    """Known concepts, preserve list, certificate, fingerprint; and a file of it loads and fits the model."""
    delta = ConceptDelta.load(quick[0].save(tmp_path / "star.safetensors"))
    assert delta.info["known"] == [{"name": "circle", "prompts": ["circle", "a circle"]}]
    assert delta.info["preserve"]["prompts"] == ["a photo of a house"]
    assert delta.info["preserve"]["count"] == 1
    assert delta.info["kv_fingerprint"] == kv_fingerprint(host.attention_layers())
    subspace = planner.plan("star")
    assert torch.equal(delta.down, subspace.down)
    assert delta.gate == subspace.gate
    assert delta.info["certificate"] == subspace.certificate.to_json()
    assert delta.info["objective"]["name"] == "gcirs"
    delta.check_fits({n: (w.shape[0], w.shape[1]) for n, w in weights(host.attention_layers()).items()})


@pytest.mark.parametrize("objective", ["gcirs", "closed-form"])
def test_the_protocols_are_all_it_needs(world: SimpleNamespace, objective: str) -> None:
    """The double world, no pipeline in sight: both objectives take the concept out of its own prompts, half precision too."""
    encoder, denoiser = world.Encoder(), world.Denoiser()
    planner = Planner(encoder, BOOK, PlanOptions(tolerance=0.03, max_rank=4, energy=0.999), ORDINARY)
    delta = make_delta(planner, "star", denoiser, TrainOptions.for_mode(objective=objective, steps=40, trajectories=4, warm_start=False))
    assert delta.architecture.startswith("unet-48x2-")
    assert delta.rank == 4
    changed = world.Denoiser()
    for name, module in projections(changed.attention_layers()).items():
        module.weight.data += delta.weight_delta(name)
    context, empty = (encoder.encode([p] * 8).context for p in ("a star", ""))
    x, t = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(9)), torch.full((8,), 400)
    r = denoiser.predict(x, t, context) - denoiser.predict(x, t, empty)
    r_changed = changed.predict(x, t, context) - changed.predict(x, t, empty)
    assert (r_changed * r).mean() < 0.5 * (r * r).mean()
