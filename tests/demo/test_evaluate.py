"""The evaluation on the embedded model with the tiny suite: all parts, resumed without work, honest about equality."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sepme import cli
from sepme.errors import Interrupted, SepMEError
from sepme.evaluate.easel import Easel
from sepme.evaluate.judge import DemoJudge, frechet, perceptual
from sepme.evaluate.methods import KEYS
from sepme.evaluate.robustness import Budget, _soft, attack, resurgence
from sepme.evaluate.run import Run
from sepme.evaluate.suite import Suite, parse
from sepme.layers import weights

SHIPPED = ("demo", "tiny", "sd14", "sd2", "sdxl")
FIGURES = {
    "erased_accuracy", "kept_accuracy", "cooccurring_accuracy", "restored_bit_identical", "untouched_bit_identical", "attack_success",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("eval")
    result = CliRunner().invoke(cli.app, ["eval", "demo", "tiny", "-o", str(out), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return out, json.loads(result.stdout)


def test_everything_is_reported(done: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = done
    suite = Suite.load("tiny")
    assert list(metrics["methods"]) == sorted(suite.methods)
    for key, found in metrics["methods"].items():
        assert set(found) >= FIGURES | {"seconds", "bytes", "resurgence_accuracy", "concepts"}
        assert ("gate_off" in found) == key.startswith("sepme")
        for part in (found, found.get("gate_off", found)):
            assert all(0 <= part[name] <= 1 for name in FIGURES)
    for key in ("sepme_gcirs", "sepme_closed_form"):
        assert metrics["methods"][key]["untouched_bit_identical"] == 1
        assert metrics["methods"][key]["restored_bit_identical"] == 1
        assert metrics["methods"][key]["gate_off"]["restored_bit_identical"] < 1
        toggles = metrics["toggles"][key]
        assert toggles["cycles"] == 8
        assert toggles["changed"] > 0
        assert [toggles[k] for k in ("off_bit_identical", "detached_bit_identical", "weights_bit_identical")] == [True] * 3
        last = metrics["scenes"][key]["3: iterative"][-1]
        assert last["recovered"]["bit_identical"] == 1
        assert last["recovered"]["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["methods"]["uce"]["untouched_bit_identical"] < 1
    assert metrics["order_gap"] >= 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(key in page for key in suite.methods)
    assert metrics["judge"] in page
    rows = list(csv.DictReader((out / "methods.csv").open()))
    assert len(rows) == len(suite.methods) + 2
    assert len(list(csv.DictReader((out / "interference.csv").open()))) == 2 * 2 * 4 * 4
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_a_second_run_does_nothing_again(done: tuple[Path, dict[str, Any]], demo_host: Any) -> None:
    out, metrics = done
    passes: list[int] = []
    handle = demo_host.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert Run(demo_host, Suite.load("tiny"), out)() == metrics
        assert passes == []
    finally:
        handle.remove()


def test_interrupted_it_goes_on(demo_host: Any, tmp_path: Path) -> None:
    """Stopped in the second method; what was done is kept, and the first method is not measured again."""
    suite = Suite.load("tiny")
    parts = Suite(**vars(suite) | {"methods": ("uce", "negative_prompt"), "parts": ("methods",)})

    def stop() -> None:
        if (tmp_path / "results" / "method-uce.json").exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        Run(demo_host, parts, tmp_path, check=stop)()
    before = (tmp_path / "results" / "method-uce.json").stat().st_mtime_ns
    metrics = Run(demo_host, parts, tmp_path)()
    assert set(metrics["methods"]) == {"uce", "negative_prompt"}
    assert (tmp_path / "results" / "method-uce.json").stat().st_mtime_ns == before


# --- the parts


def easel_for(host: Any, **changes: Any) -> Easel:
    suite = Suite(**vars(Suite.load("tiny")) | changes)
    return Easel(host, DemoJudge(suite), suite, lambda: None)


def test_learned_tokens_replace_their_prompt_alone(demo_host: Any) -> None:
    tokenizer, encoder = demo_host.encoders[0]
    prompts = ["a a", "a star"]
    plain = demo_host.encode(prompts).context
    learned = [torch.randn(2, encoder.get_input_embeddings().weight.shape[1])]
    with _soft(demo_host, "a a", learned):
        soft = demo_host.encode(prompts).context
    assert not torch.equal(soft[0], plain[0])
    assert torch.equal(soft[1], plain[1])
    assert torch.equal(demo_host.encode(prompts).context, plain)
    star = encoder.get_input_embeddings().weight[tokenizer("a star").input_ids[1:-1]].detach()
    with _soft(demo_host, "a a", [star]):
        assert torch.allclose(demo_host.encode(["a a"]).context[0], plain[1], atol=1e-5)


def test_the_attack_learns(demo_host: Any) -> None:
    """On the stock model it brings the concept: more often than the neutral words that it starts from."""
    easel = easel_for(demo_host, images=4, steps=4)
    before = attack(easel, None, Budget(concepts=1, steps=0, tokens=2), True)
    assert attack(easel, None, Budget(concepts=1, steps=40, tokens=2, batch=4, learning_rate=0.05), True) > before


def test_a_fine_tune_is_taken_back(demo_host: Any) -> None:
    from sepme.evaluate.erasers import Merged, NegativePrompt

    easel = easel_for(demo_host)
    before = {n: w.clone() for n, w in weights(demo_host.attention_layers()).items()}
    for eraser in (NegativePrompt(), Merged(lambda names: {n: 0.01 * torch.ones_like(w) for n, w in before.items()}, 0)):
        assert 0 <= resurgence(easel, eraser, True, steps=2, batch=2, learning_rate=1e-3) <= 1
        after = weights(demo_host.attention_layers())
        assert all(torch.equal(after[n], w) and not after[n].requires_grad for n, w in before.items())


def test_distances(demo_host: Any) -> None:
    """Fréchet distance by its formula, in float64; 0 for equal sets."""
    judge = DemoJudge(Suite.load("tiny"))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(40, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    b = (b * 0.5 + 0.3).clamp(-1, 1)
    fa, fb = judge.features(a).double(), judge.features(b).double()
    covariance = [torch.cov(f.T) for f in (fa, fb)]
    root = torch.linalg.eigvals(covariance[0] @ covariance[1]).sqrt().real.sum()
    expected = float((fa.mean(0) - fb.mean(0)).square().sum() + covariance[0].trace() + covariance[1].trace() - 2 * root)
    assert frechet(judge, b, a) == pytest.approx(expected, rel=1e-3)
    assert frechet(judge, a, a) == pytest.approx(0, abs=1e-6 * expected)
    assert perceptual(judge, a, a) == 0 < perceptual(judge, b, a)


# --- suites


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites(name: str) -> None:
    suite = Suite.load(name)
    assert set(suite.methods) <= set(KEYS)
    for concept in suite.names:
        assert not set(suite.prompts(concept)) & set(suite.prompts(concept, unseen=True))
        assert all(other != concept for _, other in suite.cooccurring(concept))
    if name != "tiny":
        assert suite.methods == KEYS
        assert len(suite.scenes) == 4
    if name == "sd14":
        assert [len(v) for v in suite.concepts.values()] == [9, 9]
        assert suite.images == 50


def test_bad_suites(tmp_path: Path, demo_host: Any) -> None:
    good = {
        "name": "x", "judge": "demo", "concepts": {"object": ["star"]}, "templates": {"object": {"trained": ["{}"], "unseen": ["a {}"]}},
        "both": [],
    }  # fmt: skip
    for change, message in (
        ({"judge": None}, "judge is demo or clip"),
        ({"methods": ["magic"]}, "methods are among"),
        ({"colour": 1}, "no entry 'colour'"),
        ({"concepts": {"thing": ["star"]}}, "missing or of the wrong kind"),
        ({"templates": {"object": {"trained": ["{}"]}}}, "missing or of the wrong kind"),
        ({"scenes": [{"name": "1", "events": [{"hide": ["star"]}]}]}, "events are erase or recover"),
        ({"scenes": [{"name": "1", "events": [{"erase": ["moon"]}]}]}, "events are erase or recover"),
    ):
        with pytest.raises(SepMEError, match=message):
            parse(good | change, "x.yaml")
    with pytest.raises(SepMEError, match="it needs the entries"):
        parse([], "x.yaml")
    with pytest.raises(SepMEError, match="There is no suite"):
        Suite.load("nowhere")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(SepMEError, match="not readable YAML at line"):
        Suite.load(str(tmp_path / "x.yaml"))
    with pytest.raises(SepMEError, match="judged by CLIP"):
        Run(demo_host, Suite.load("sd14"), tmp_path)
    assert math.isnan(easel_for(demo_host).stock(easel_for(demo_host).unrelated()).accuracy)
