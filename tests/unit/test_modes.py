"""Modes paper and unrestricted, joint training, pictures as source of x_t, resuming; on a tiny real pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from sepme import cli
from sepme.apply.composition import Composition
from sepme.bench import train as bench
from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import Interrupted, SepMEError
from sepme.hosts.diffusers import DiffusersHost
from sepme.images import load_folder
from sepme.plan.planner import Planner
from sepme.train import Pictures, Progress, TrainOptions, make_delta, make_deltas, plan_options
from sepme.train.compress import compress
from sepme.train.loop import balance

Hosts = Callable[..., DiffusersHost]
NAMES = ("tree", "star")
BOOK = ConceptBook(tuple(Concept(n, (n, f"a {n}")) for n in NAMES), preserve=("the moon",))


def planner_for(host: DiffusersHost, mode: str, /, **given: Any) -> Planner:
    return Planner(host, BOOK, plan_options(mode, **given), ordinary=("a house", "red boat"))


def test_many_concepts_are_planned_in_mode_soft() -> None:
    assert [plan_options("subspace", concepts=n).mode for n in (1, 49, 50)] == ["tolerance", "tolerance", "soft"]
    assert plan_options("subspace", concepts=50, mode="exact").mode == "exact"
    assert plan_options("paper", concepts=50).mode == "exact"
    assert plan_options("unrestricted", concepts=50).mode == "tolerance"


class Losses(dict[str, list[float]]):
    """Callback that keeps every concept's losses in full precision and may interrupt."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after

    def __call__(self, step: Progress) -> None:
        self.setdefault(step.concept, []).append(step.loss)
        if step.step == self.stop_after:
            raise Interrupted


@pytest.mark.parametrize("mode", ["paper", "subspace"])
def test_joint_and_separate_training_agree(mode: str, make_host: Hosts, tmp_path: Path) -> None:
    """η = 1, no early stop, one generator per concept, the same draws: step for step (METHOD, section 2)."""
    # D is stored, and so applied, in float32: there A D = 0 holds to 1e-7 and not to 1e-15
    rtol = 1e-9 if mode == "paper" else 1e-6
    host = make_host(torch.float64)
    planner = planner_for(host, mode, mode="exact") if mode == "subspace" else planner_for(host, mode)
    steps = 6
    options = TrainOptions.for_mode(
        mode=mode, steps=steps, min_steps=steps, eta_cap=0.0, batch=2, trajectories=2, beta=0.1, checkpoint_every=steps
    )
    together, apart = Losses(), Losses()
    make_deltas(planner, NAMES, host, options, tmp_path / "joint.safetensors", together)
    joint = load_file(tmp_path / "joint.safetensors")
    for index, name in enumerate(NAMES):
        make_delta(planner, name, host, options, tmp_path / f"{name}.safetensors", apart)
        alone = load_file(tmp_path / f"{name}.safetensors")
        assert len(together[name]) == steps
        assert together[name] == pytest.approx(apart[name], rel=rtol)
        for key in (k for k in alone if k.startswith("0.w.")):
            ours, theirs = joint[f"{index}{key[1:]}"], alone[key]
            assert theirs.abs().max() > 0
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < rtol


@pytest.mark.parametrize("mode", ["paper", "subspace", "unrestricted"])
def test_interrupted_training_gives_the_same_bytes(mode: str, make_host: Hosts, tmp_path: Path) -> None:
    names = NAMES[:1] if mode == "unrestricted" else NAMES
    host = make_host()
    planner = planner_for(host, mode)
    options = TrainOptions.for_mode(mode=mode, steps=5, batch=1, trajectories=2, checkpoint_every=2)
    through = [d.to_bytes() for d in make_deltas(planner, names, host, options, tmp_path / "a.safetensors")]

    def stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):  # while images are drawn
        make_deltas(planner, names, host, options, tmp_path / "b.safetensors", check=stop)
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(Interrupted):
        make_deltas(planner, names, host, options, tmp_path / "b.safetensors", Losses(stop_after=3))
    rest = Losses()
    resumed = [d.to_bytes() for d in make_deltas(planner, names, host, options, tmp_path / "b.safetensors", rest)]
    assert [len(v) for v in rest.values()] == [2] * len(names)
    assert resumed == through


def test_paper_delta_does_what_full_width_training_found(make_host: Hosts, tmp_path: Path) -> None:
    host = make_host()
    planner = planner_for(host, "paper")
    options = TrainOptions.for_mode(mode="paper", steps=4, batch=1, trajectories=2, checkpoint_every=4)
    delta = make_delta(planner, "tree", host, options, tmp_path / "c.safetensors")
    w = load_file(tmp_path / "c.safetensors")
    sp = planner.null_space("tree").float()
    own = planner.prompts.encodings["tree"].context.flatten(0, 1)
    known = torch.cat(
        [planner.prompts.encodings["star"].context, planner.prompts.empty.context, planner.prompts.preserved.listed.context]
    ).flatten(0, 1)
    facts = delta.info["compression"]
    assert delta.rank == facts["rank"] == facts["full_rank"] == 17  # 2 x 10 tokens; both BOS and the "a" of "a star" lie in A
    for name in delta.up:
        full = own @ (w[f"0.w.{name}"] @ (options.beta * sp).T).T
        stored = own @ delta.weight_delta(name).T
        assert float((stored - full).norm() / full.norm()) < 1e-3  # float16 in the file
        assert float((known @ delta.weight_delta(name).T).norm() / stored.norm()) < 1e-5
    assert "separable" not in delta.info["certificate"]
    capped = make_delta(planner_for(host, "paper", max_rank=2), "tree", host, options)
    assert capped.rank == 2
    loss = capped.info["compression"]["response_loss"]["2"]
    assert 0 < loss < 1
    back = [(own @ (capped.weight_delta(n) - delta.weight_delta(n)).T).square().sum() for n in delta.up]
    whole = [(own @ delta.weight_delta(n).T).square().sum() for n in delta.up]
    assert float((sum(back) / sum(whole)) ** 0.5) == pytest.approx(loss, rel=1e-2)


def test_compression_loses_what_it_says_and_no_basis_loses_less() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    null = torch.linalg.qr(normal(20, 12)).Q
    tokens = normal(9, 4) @ normal(4, 20) * 10 + normal(9, 3) @ normal(3, 20)
    w = {"a": normal(5, 12), "b": normal(6, 12)}
    response = torch.cat([tokens @ null @ (0.5 * v).T for v in w.values()], dim=1)
    singular = torch.linalg.svdvals(response)
    for cap in (1, 3, 6, 7, 50):
        basis, up, facts = compress(w, null, tokens, 0.5, cap, 1.0)
        k = min(cap, 7)
        assert (facts["rank"], facts["full_rank"], basis.shape[1]) == (k, 7, k)
        torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))
        torch.testing.assert_close(null @ null.T @ basis, basis)
        left = response - torch.cat([tokens @ basis @ v.T for v in up.values()], dim=1)
        best = float(singular[k:].norm() / singular.norm())
        assert float(left.norm() / response.norm()) == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert facts["response_loss"][str(k)] == pytest.approx(best, rel=1e-6, abs=1e-7)
    assert compress(w, null, tokens, 0.5, 50, 0.5).facts["rank"] < 7


def test_unrestricted_is_a_full_rank_delta_that_says_it_is_not_separable(make_host: Hosts, tmp_path: Path) -> None:
    host = make_host()
    passes = 0

    def count(*args: Any) -> None:
        nonlocal passes
        passes += 1

    planner = planner_for(host, "unrestricted")
    options = TrainOptions.for_mode(mode="unrestricted", steps=2, batch=1, source="trajectory", trajectories=1, checkpoint_every=1)
    path = tmp_path / "c.safetensors"

    def hooked(step: Progress) -> None:
        if step.step == 1:
            host.unet.register_forward_hook(count)

    delta = make_delta(planner, "tree", host, options, path, hooked)
    assert passes == 4
    assert torch.equal(delta.down, torch.eye(64))
    assert delta.gate == 0
    certificate = delta.info["certificate"]
    assert certificate["separable"] is False
    assert certificate["leakage_gated"]["(empty prompt)"] == pytest.approx(1)
    assert certificate["false_touch_rate"] == 1
    w = load_file(path)
    name = next(iter(delta.up))
    assert float(w[f"0.w.{name}"].abs().max()) == pytest.approx(2e-5, rel=0.1)  # two steps of Adam at 1e-5
    torch.testing.assert_close(delta.weight_delta(name), w[f"0.w.{name}"], rtol=1e-3, atol=1e-8)
    assert len(Composition((delta,)).touch(planner.prompts.empty.context, torch.ones(1)).rows) == 1
    delta.save(tmp_path / "delta.safetensors")
    assert ConceptDelta.load(tmp_path / "delta.safetensors").content_hash() == delta.content_hash()
    with pytest.raises(SepMEError, match="one by one"):
        make_deltas(planner, NAMES, host, options)


def test_mode_defaults_and_refusals() -> None:
    paper = TrainOptions.for_mode(mode="paper")
    assert (paper.learning_rate, paper.beta, paper.regularisation, paper.momentum, paper.threshold) == (0.1, 1e-4, 1e-6, 0.9, 0.0)
    assert (paper.steps, paper.min_steps, paper.source, paper.regularise) == (1000, 10, "drawn", "w")
    assert TrainOptions.for_mode(mode="unrestricted").learning_rate == 1e-5
    assert (TrainOptions().learning_rate, TrainOptions().beta, TrainOptions().source) == (0.03, 1.0, "trajectory")
    assert TrainOptions.for_mode(mode="paper", learning_rate=0.5).learning_rate == 0.5
    for wrong in ({"mode": "best"}, {"mode": "paper", "warm_start": True}, {"mode": "paper", "objective": "closed-form"}, {"steps": 0}):
        with pytest.raises(SepMEError):
            TrainOptions.for_mode(**wrong)


def test_balance() -> None:
    assert balance([2.0, 1.0, -4.0], 100) == [1.0, 4.0, 0.25]
    assert balance([2.0, 0.01, 0.0], 100) == [1.0, 100, 100]
    assert balance([-1.0], 100) == balance([0.0], 100) == [1.0]
    assert balance([2.0, 1.0], 0) == [1.0, 1.0]


def paint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), (255, 0, 0)).save(folder / "a.png")
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(folder / "b.webp", lossless=True)
    Image.new("L", (16, 16), 0).save(folder / "c.JPG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_folder_of_pictures(tmp_path: Path) -> None:
    images, digest = load_folder(paint(tmp_path / "mine"), 16)
    assert images.shape == (3, 3, 16, 16)
    assert images[0, :, 8, 8].tolist() == [1, -1, -1]
    assert images[1].min() == 1  # transparency on white
    assert images[2].max() == -1
    assert load_folder(paint(tmp_path / "again"), 16)[1] == digest
    (tmp_path / "mine" / "d.png").write_bytes((tmp_path / "mine" / "a.png").read_bytes()[:40])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "e.png").write_bytes(b"GIF89a")
    (tmp_path / "empty").mkdir()
    for folder, message in (("mine", "d.png"), ("bad", "e.png"), ("empty", "holds 0"), ("nowhere", "check the path")):
        with pytest.raises(SepMEError, match=message):
            load_folder(tmp_path / folder, 16)


def test_pictures_are_what_is_noised(make_host: Hosts, tmp_path: Path) -> None:
    host = make_host()
    images, digest = load_folder(paint(tmp_path / "mine"), host.image_size)
    pictures = Pictures(host.encode_images(images), digest)
    assert pictures.latents.shape == (3, 4, 4, 4)
    with torch.no_grad():
        expected = host.pipe.vae.encode(images).latent_dist.mean * host.pipe.vae.config.scaling_factor
    torch.testing.assert_close(pictures.latents, expected)
    heard: list[Tensor] = []
    host.noise = lambda x_0, noise, t: heard.append(x_0) or DiffusersHost.noise(host, x_0, noise, t)  # type: ignore[method-assign,func-returns-value]
    delta = make_delta(planner_for(host, "subspace"), "tree", host, TrainOptions(steps=3, batch=2), pictures=pictures)
    assert delta.info["recipe"]["pictures"] == {"count": 3, "sha256": digest}
    assert len(heard) == 3
    assert all(any(torch.equal(row, x) for x in pictures.latents) for row in torch.cat(heard))


def test_command_line(make_host: Hosts, tmp_path: Path) -> None:
    make_host().pipe.save_pretrained(tmp_path / "model")
    book = tmp_path / "book.yaml"
    book.write_text("concepts:\n- {name: tree, prompts: [tree]}\n- {name: star, prompts: [star]}\n")
    command = ["train", str(tmp_path / "model"), str(book), "-o", str(tmp_path / "out"), "--mode", "paper", "--joint", "--steps", "2"]
    command += ["--batch", "1", "--images", str(paint(tmp_path / "mine")), "--json"]
    paint(tmp_path / "mine" / "star")
    first = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    rows = json.loads(first.stdout)["deltas"]
    assert [r["concept"] for r in rows] == ["tree", "star"]
    delta = ConceptDelta.load(tmp_path / "out" / "star.safetensors")
    assert delta.info["recipe"]["joint"] == ["tree", "star"]
    assert delta.info["objective"]["mode"] == "paper"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["star.safetensors", "tree.safetensors"]
    before = (tmp_path / "out" / "tree.safetensors").stat().st_mtime_ns
    again = CliRunner().invoke(cli.app, [*command, "--resume"], catch_exceptions=False)
    assert [r["content_hash"] for r in json.loads(again.stdout)["deltas"]] == [r["content_hash"] for r in rows]
    assert (tmp_path / "out" / "tree.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SepMEError, match="no mode"):
        CliRunner().invoke(cli.app, [*command, "--mode", "best"], catch_exceptions=False)


def test_bench_sides_start_from_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    size = bench.UNetSize(channels=(32,), layers=1, latent=8, d_in=32, tokens=4)
    both = bench.Comparison(size)
    step, published = both.ours(), both.published()
    assert step()[0].losses[0] == pytest.approx(published(), rel=1e-4)
    monkeypatch.setattr(bench, "memory", lambda side, size: {"before": 1, "peak": 4 if side == "ours" else 11})
    result = bench.run(size, pairs=1)
    assert result["train_memory_ratio"] == pytest.approx(0.3)
    assert result["train_step_speedup"] > 0
    assert result["width"] == {"ours": 4, "published": 24}
    with pytest.raises(SepMEError):
        bench.UNetSize(channels=(30,))
