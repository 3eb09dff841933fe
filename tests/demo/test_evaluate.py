"""The evaluation on the embedded model with the tiny suite: all parts, resumed without work, honest about equality."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sepme import cli
from sepme.concepts import Concept, ConceptBook
from sepme.errors import Interrupted, SepMEError
from sepme.evaluate.attacks import Attack, Budget, words
from sepme.evaluate.classifiers import EmbeddedClassifier, _lpips, frechet, measures, perceptual
from sepme.evaluate.erasers import Separable
from sepme.evaluate.methods import KEYS
from sepme.evaluate.robustness import resurgence
from sepme.evaluate.run import Run
from sepme.evaluate.sampler import Sampler
from sepme.evaluate.suite import Suite, parse
from sepme.model import schedule
from sepme.model.layers import weights
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta
from sepme.train.soft_prompt import inserted

SHIPPED = ("demo", "tiny", "paper", "sd14", "sd2", "sdxl")
FIGURES = {
    "erased_accuracy", "kept_accuracy", "cooccurring_accuracy", "restored_bit_identical", "untouched_bit_identical", "attack_success",
    "attack_text", "attack_text_named",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("eval")
    (out / "few.yaml").write_text("like: tiny\nmethods: [sepme_gcirs, esd, uce]\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "TRAJECTORY", schedule.TRAJECTORY._replace(steps=4))
        result = CliRunner().invoke(cli.app, ["eval", "demo", str(out / "few.yaml"), "-o", str(out), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return out, json.loads(result.stdout)


def test_everything_is_reported(done: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = done
    suite = Suite.load(str(out / "few.yaml"))
    assert list(metrics["methods"]) == sorted(suite.methods)
    for key, found in metrics["methods"].items():
        assert set(found) >= FIGURES | {"seconds", "bytes", "resurgence_accuracy", "neighbour_accuracy", "concepts"}
        assert ("gate_off" in found) == key.startswith("sepme")
        assert ("attack_text_named_gate_aware" in found) == key.startswith("sepme")
        assert "attack_text_gate_aware" not in found.get("gate_off", {})
        for part in (found, found.get("gate_off", found)):
            assert all(0 <= part[name] <= 1 for name in FIGURES)
    own = [key for key in suite.methods if key.startswith("sepme")]
    for key in own:
        assert metrics["methods"][key]["untouched_bit_identical"] == 1
        assert metrics["methods"][key]["restored_bit_identical"] == 1
        assert metrics["methods"][key]["gate_off"]["restored_bit_identical"] < 1
        toggles = metrics["toggles"][key]
        assert toggles["cycles"] == 8
        assert toggles["changed"] > 0
        assert [toggles[k] for k in ("off_bit_identical", "detached_bit_identical", "weights_bit_identical")] == [True] * 3
        events = metrics["scenes"][key]["3: iterative"]
        on, off = events[-2:]
        assert (on["gate"], off["gate"]) == (True, False)
        assert [e["erased"]["concepts"] for e in events[::2]] == [["star"], ["star", "openmoji"], ["openmoji"]]
        assert [e["erased"]["pictures"] for e in events[::2]] == [4, 4, 4]  # of one concept as of two: three, in whole pieces of two
        assert on["recovered"]["accuracy"] == on["recovered"]["stock_accuracy"]
        assert on["recovered"]["bit_identical"] == 1 > off["recovered"]["bit_identical"]
        assert on["recovered"]["fid"] == 0 < off["recovered"]["fid"]
        subset = metrics["subsets"][key]
        assert subset["True"][0]["restored_bit_identical"] == 1 > subset["False"][0]["restored_bit_identical"]
        synonyms = metrics["interference"][key]["True"]["kinds"]["synonym"]["accuracy"]
        assert [row[0] for row in synonyms] == [None, None]
        assert all(0 <= row[1] <= 1 for row in synonyms)
    assert metrics["methods"]["uce"]["untouched_bit_identical"] < 1
    for key in ("esd", "uce"):
        events = metrics["scenes"][key]["3: iterative"]
        assert [e["gate"] for e in events] == [True] * 3
        assert [e["erased"]["concepts"] for e in events] == [["star"], ["star", "openmoji"], ["openmoji"]]
        assert events[-1]["recovered"]["bit_identical"] < 1
    assert metrics["order_gap"] >= 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(key in page for key in suite.methods)
    assert metrics["judge"] in page
    assert "in place of LPIPS" in page
    assert sorted(p.name for p in (out / "images").iterdir()) == sorted(
        f"{k}.jpg" for k in ("stock", *suite.methods, *(f"{k}-gate-off" for k in own))
    )
    rows = list(csv.DictReader((out / "methods.csv").open()))
    assert len(rows) == len(suite.methods) + len(own)
    assert len(list(csv.DictReader((out / "interference.csv").open()))) == len(own) * 2 * 5 * 4
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_a_suite_of_another_models_words(demo_host: Any, tmp_path: Path) -> None:
    """The classifier beside the model cannot read them, which is said before anything is drawn."""
    tiny = Suite.load("tiny")
    suite = Suite(**vars(tiny) | {"concepts": {"object": ("walrus",), "style": ("openmoji",)}})
    with pytest.raises(SepMEError, match="'walrus' cannot be told apart by the embedded classifier; choose a suite for this model"):
        Run(demo_host, suite, tmp_path)


def test_a_second_run_does_nothing_again(done: tuple[Path, dict[str, Any]], demo_host: Any) -> None:
    out, metrics = done
    passes: list[int] = []
    handle = demo_host.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert Run(demo_host, Suite.load(str(out / "few.yaml")), out)() == metrics
        assert passes == []
    finally:
        handle.remove()


def test_a_report_of_scenes_alone(done: tuple[Path, dict[str, Any]], demo_host: Any, tmp_path: Path) -> None:
    """It has no empty table of methods, and says nothing of attacks that were not made."""
    shutil.copytree(done[0] / "results", tmp_path / "results")
    suite = Suite.load(str(done[0] / "few.yaml"))
    metrics = Run(demo_host, Suite(**vars(suite) | {"parts": ("scenes", "order")}), tmp_path)()
    assert metrics["scenes"] == done[1]["scenes"]
    page, whole = ((folder / "report.html").read_text(encoding="utf-8") for folder in (tmp_path, done[0]))
    for part in ("<h2>Methods", "<h2>Pictures", "Attack: ", "the attack reaches"):
        assert part in whole
        assert part not in page
    assert "<h2>Scenes: esd" in page
    assert "<h2>Order of arrival" in page


def test_interrupted_it_goes_on(demo_host: Any, tmp_path: Path) -> None:
    """Stopped in the second method; what was done is kept, and the first method is not measured again."""
    suite = Suite.load("tiny")
    parts = Suite(**vars(suite) | {"methods": ("uce", "negative_prompt"), "parts": ("methods",)})

    def stop() -> None:
        if (tmp_path / "results" / "method-uce.json").exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        Run(demo_host, parts, tmp_path, check=stop)()
    before = (tmp_path / "results" / "method-uce.json").read_bytes()
    when = (tmp_path / "results" / "method-uce.json").stat().st_mtime_ns
    metrics = Run(demo_host, parts, tmp_path, keep_images=True)()
    assert set(metrics["methods"]) == {"uce", "negative_prompt"}
    assert (tmp_path / "results" / "method-uce.json").stat().st_mtime_ns == when
    assert (tmp_path / "images" / "negative_prompt-erased.png").exists()  # all pictures, on request
    assert not (tmp_path / "images" / "uce-erased.png").exists()
    other = Suite(**vars(parts) | {"settings": {"uce": {"ridge": 10.0}}})
    Run(demo_host, other, tmp_path)()
    assert (tmp_path / "results" / "method-uce.json").read_bytes() != before
    assert not (tmp_path / "images" / "uce-erased.png").exists()


# --- the parts


def sampler_for(host: Any, **changes: Any) -> Sampler:
    suite = Suite(**vars(Suite.load("tiny")) | changes)
    return Sampler(host, EmbeddedClassifier(), suite, lambda: None)


def test_learned_tokens_replace_their_prompt_alone(demo_host: Any) -> None:
    tokenizer, encoder = demo_host.encoders[0]
    prompts = ["a a", "a star"]
    plain = demo_host.encode(prompts).context
    learned = [torch.randn(2, encoder.get_input_embeddings().weight.shape[1])]
    with inserted(demo_host, "a a", learned):
        soft = demo_host.encode(prompts).context
    assert not torch.equal(soft[0], plain[0])
    assert torch.equal(soft[1], plain[1])
    assert torch.equal(demo_host.encode(prompts).context, plain)
    star = encoder.get_input_embeddings().weight[tokenizer("a star").input_ids[1:-1]].detach()
    with inserted(demo_host, "a a", [star]):
        assert torch.allclose(demo_host.encode(["a a"]).context[0], plain[1], atol=1e-5)


def test_the_attack_learns(demo_host: Any) -> None:
    """On the stock model it brings the concept: more often than the neutral words that it starts from."""
    sampler = sampler_for(demo_host, images=4, steps=4)
    before = Attack(sampler, None, "star", Budget(steps=0, tokens=2), True).success(Attack.learn)
    assert Attack(sampler, None, "star", Budget(steps=40, tokens=2, batch=4, learning_rate=0.05), True).success(Attack.learn) > before


def test_words_are_found(demo_host: Any) -> None:
    """The search ends at words of the tokenizer that lower the stock model's loss, and around a name it leaves the name where it is."""
    sampler = sampler_for(demo_host, images=4, steps=4)
    attack = Attack(sampler, None, "star", Budget(tokens=2, rounds=6, candidates=16), True)
    found = attack.search()
    assert set(found.split()) <= set(words(demo_host.encoders[0][0]))
    noised = attack._noised(64)
    with torch.no_grad():
        losses = attack._losses(demo_host.encode(["a a", found]), *noised)
    assert losses[1] < losses[0]
    named = attack.search_around_name().split()
    assert len(named) == 3
    assert named[1] == "star"


def test_losses_of_several_prompts(demo_host: Any) -> None:
    """Each prompt's loss is the one that it has alone, and that of the equation."""
    attack = Attack(sampler_for(demo_host), None, "star", Budget(batch=3), True)
    prompts, (noise, t, x_t) = ["a star", "blue", ""], attack._noised()
    with torch.no_grad():
        together = attack._losses(demo_host.encode(prompts), noise, t, x_t)
        alone = [attack._losses(demo_host.encode([p]), noise, t, x_t) for p in prompts]
        context = demo_host.encode(["blue"]).context.expand(3, -1, -1)
        error = (demo_host.predict(x_t, t, context, None) - noise).square().mean()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together[1], error, rtol=1e-4, atol=1e-6)


def test_an_attacker_who_knows_the_gate_keeps_it_shut(demo_host: Any) -> None:
    """The statistic is the gate's own, and learning with it in the loss ends behind it where learning without does not."""
    book = ConceptBook((Concept("star", ("star", "a star", "a picture of a star")),), ("a church", "blue", "a red tulip"))
    planner = Planner(demo_host, book, PlanOptions(), ())
    eraser = Separable([make_delta(planner, "star", demo_host, TrainOptions(objective="closed-form"))])
    context = demo_host.encode(["a star", "blue", "a church", "a red star on paper"]).context
    _, weight = eraser.composition.weigh(context, torch.ones(1), True)
    assert torch.equal(eraser.openness(context, "star") > 1, weight[:, 0] > 0)
    sampler, budget = sampler_for(demo_host), Budget(steps=40, tokens=2, batch=2, learning_rate=0.05, start="name")
    for aware in (False, True):
        attack = Attack(sampler, eraser, "star", budget, True, aware)
        prompt = attack.learn()
        assert attack.soft is not None
        with inserted(demo_host, prompt, attack.soft.learned):
            assert (float(eraser.openness(demo_host.encode([prompt]).context, "star")) <= 1) == aware


def test_a_fine_tune_is_taken_back(demo_host: Any) -> None:
    from sepme.evaluate.erasers import Merged, NegativePrompt

    sampler = sampler_for(demo_host)
    before = {n: w.clone() for n, w in weights(demo_host.attention_layers()).items()}
    for eraser in (NegativePrompt(), Merged(lambda names: {n: 0.01 * torch.ones_like(w) for n, w in before.items()}, 0)):
        assert 0 <= resurgence(sampler, eraser, True, steps=2, batch=2, learning_rate=1e-3) <= 1
        after = weights(demo_host.attention_layers())
        assert all(torch.equal(after[n], w) and not after[n].requires_grad for n, w in before.items())


def test_distances(demo_host: Any) -> None:
    """Fréchet distance by its formula, in float64; 0 for equal sets."""
    classifier = EmbeddedClassifier()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(40, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    b = (b * 0.5 + 0.3).clamp(-1, 1)
    fa, fb = classifier.features(a).double(), classifier.features(b).double()
    covariance = [torch.cov(f.T) for f in (fa, fb)]
    root = torch.linalg.eigvals(covariance[0] @ covariance[1]).sqrt().real.sum()
    expected = float((fa.mean(0) - fb.mean(0)).square().sum() + covariance[0].trace() + covariance[1].trace() - 2 * root)
    assert frechet(classifier, b.split(15), a.split(7)) == pytest.approx(expected, rel=1e-3)
    assert frechet(classifier, [a], [a]) == pytest.approx(0, abs=1e-6 * expected)
    assert (
        perceptual(classifier, [a], [a])
        == 0
        < perceptual(classifier, [b], [a])
        == pytest.approx(perceptual(classifier, b.split(9), a.split(9)))
    )


def test_lpips_where_its_weights_are_at_hand(demo_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in torch's hub folder stand for AlexNet's; torchmetrics' LPIPS reads them, and the report says so."""
    from torchvision.models import AlexNet_Weights, alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    classifier = EmbeddedClassifier()
    a, b = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(2))
    assert _lpips() is None
    assert "in place of LPIPS" in measures(classifier)
    torch.manual_seed(0)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "hub" / "checkpoints" / AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[-1])
    classifier.lpips = _lpips()
    assert "distance: LPIPS (AlexNet)" in measures(classifier)
    one_by_one = [float(classifier.lpips(x[None], y[None])) for x, y in zip(a, b, strict=True)]
    assert perceptual(classifier, a.split(2), b.split(2)) == pytest.approx(sum(one_by_one) / 3)
    assert perceptual(classifier, [a], [a]) == 0 < min(one_by_one)


def test_prompt_weights(demo_host: Any) -> None:
    """``c_∅ + w (c − c_∅)`` of the prompts and of no negative prompt; the host is left as it was; the gate decides on what it sees."""
    sampler = sampler_for(demo_host)
    seen: list[torch.Tensor] = []
    plain = {p: demo_host.encode([p]).context[0] for p in ("", "star", "a star")}

    class Listening:
        def generate(self, host: Any, prompts: Any, seeds: Any, erased: Any, gate: Any, **options: Any) -> torch.Tensor:
            seen.extend(host.encode(list(prompts)).context)
            seen.extend(host.encode(["star"]).context)
            return host.generate(prompts, seeds, **options)

    batch = sampler.sets.weighted("star")
    assert batch.prompts == ("star", "a star")
    assert sampler.sample(batch, Listening(), ["star"]).same.all()  # type: ignore[arg-type]
    for c, p in zip(seen[:2], batch.prompts, strict=True):
        torch.testing.assert_close(c, plain[""] + 1.4 * (plain[p] - plain[""]))
    torch.testing.assert_close(seen[2], plain["star"])
    torch.testing.assert_close(demo_host.encode(["star"]).context[0], plain["star"])
    assert not torch.equal(sampler.stock(batch).latents, sampler.stock(sampler.sets.own("star")).latents)


def test_a_few_at_once(demo_host: Any) -> None:
    """Pieces of a batch are the pictures of the whole, drawn in less company."""
    whole, pieces = (sampler_for(demo_host, images=3, batch=size) for size in (32, 2))
    batch = whole.sets.own("star")
    torch.testing.assert_close(whole.stock(batch).latents, pieces.stock(batch).latents, rtol=1e-3, atol=1e-3)
    sizes: list[int] = []
    handle = demo_host.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        pieces.stock(whole.sets.own("openmoji"))
    finally:
        handle.remove()
    assert set(sizes) == {4, 2}  # with and without the prompt


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
    if name.startswith("sd") or name == "paper":
        assert [len(v) for v in suite.concepts.values()] == [9, 9]
    assert suite.name == name
    if name.startswith("sd"):
        assert suite.images == (50 if name == "sdxl" else 50 * 5)


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
        ({"scenes": [{"name": "1", "kind": "mood", "events": []}]}, "a scene is of kind 'mood'; kinds are object"),
        ({"scenes": [{"name": "1", "events": [{"hide": ["star"]}]}]}, "events are erase or recover"),
        ({"scenes": [{"name": "1", "pictures": "many", "events": []}]}, "a scene has 'many' pictures; give a whole number from 1"),
        ({"scenes": [{"name": "1", "events": [{"erase": ["moon"]}]}]}, "events are erase or recover"),
        ({"neighbours": {"object": ["star"]}}, "a neighbour that is a concept"),
        ({"neighbours": {"thing": ["sun"]}}, "missing or of the wrong kind"),
        ({"synonyms": {"moon": ["the moon"]}}, "synonyms of no concept"),
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
    (tmp_path / "y.yaml").write_text("like: tiny\nname: y\nimages: 3\n")
    assert vars(Suite.load(str(tmp_path / "y.yaml"))) == vars(Suite.load("tiny")) | {"name": "y", "images": 3}
    (tmp_path / "y.yaml").write_text("like: nowhere\nname: y\n")
    with pytest.raises(SepMEError, match="like one that is not shipped"):
        Suite.load(str(tmp_path / "y.yaml"))
    with pytest.raises(SepMEError, match="classified by CLIP"):
        Run(demo_host, Suite.load("sd14"), tmp_path)
    assert math.isnan(sampler_for(demo_host).stock(sampler_for(demo_host).sets.unrelated()).accuracy)
