"""What becomes of edits of the context outside of sampling: LoRA and checkpoint, reprojection, verification, attacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sepme.apply.composition import Composition
from sepme.cli import app
from sepme.concepts import Concept, ConceptBook
from sepme.convert import export_checkpoint, export_lora, import_eraser, model_weights, order_gap, reproject
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.verify import check_encoder, encoder_warnings
from sepme.errors import SepMEError
from sepme.evaluate.erasers import Separable
from sepme.hosts.diffusers import DEMO, DiffusersHost
from sepme.model.encoder_fingerprint import EncoderFingerprint
from sepme.model.families import clip_of_width, family_of
from sepme.model.layers import projections, shapes, weight_of
from sepme.model.protocols import Encoding
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta

CONCEPTS = tuple(Concept(n, (n, f"a {n}", f"a picture of a {n}")) for n in ("star", "tulip"))


def planner_of(host: Any, *more: str) -> Planner:
    late = tuple(Concept(n, (n, f"a {n}")) for n in more)
    return Planner(host, ConceptBook((*CONCEPTS, *late)), PlanOptions(), ())


@pytest.fixture(scope="module")
def made(demo_host: DiffusersHost) -> dict[str, ConceptDelta]:
    """The star as an edit of the context, of the projections, and half of either."""
    planner = planner_of(demo_host)
    context, layers = (make_delta(planner, "star", demo_host, TrainOptions(objective="closed-form", edit=e)) for e in ("context", "layers"))
    half = {n: d.up_factor(n) / 2 for d in (context, layers) for n in d.up}
    both = ConceptDelta.from_factors(layers.concept, layers.down, half, layers.gate, layers.info | context.info)
    return {"context": context, "layers": layers, "both": both}


@pytest.fixture(scope="module")
def tulip(demo_host: DiffusersHost) -> ConceptDelta:
    return make_delta(planner_of(demo_host), "tulip", demo_host, TrainOptions(objective="closed-form", edit="layers"))


def inputs(host: DiffusersHost) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and the contexts of a prompt that is touched and of one that is not."""
    x = host.latents([0, 1])
    return x, torch.tensor([500, 500]), host.encode(["a picture of a star", "a tulip"]).context


@contextmanager
def changed(host: DiffusersHost, changes: dict[str, torch.Tensor]) -> Iterator[None]:
    """The host's weights with ΔW added."""
    modules = {n: m for n, m in projections(host.attention_layers()).items() if n in changes}
    before = {n: weight_of(m).clone() for n, m in modules.items()}
    for name, module in modules.items():
        weight_of(module).add_(changes[name])
    try:
        yield
    finally:
        for name, module in modules.items():
            weight_of(module).copy_(before[name])


@pytest.mark.parametrize("form", ["context", "both"])
@torch.no_grad()
def test_a_lora_is_the_edit(form: str, demo_host: DiffusersHost, made: dict[str, ConceptDelta], tmp_path: Path) -> None:
    """The same noise as with the edited context, gate off, at another strength too; W is read from the model's files."""
    delta, (x, t, context) = made[form], inputs(demo_host)
    table = torch.tensor([0.7])
    with Separable([delta]).acting(demo_host, [], False):
        stock = demo_host.predict(x, t, context)
    eraser = Separable([delta])
    eraser.strength = 0.7
    with eraser.acting(demo_host, ["star"], False):
        edited = demo_host.predict(x, t, context)
    if form == "context":
        direct = demo_host.predict(x, t, Composition((delta,)).edit_context(context, table, gate=False))
        torch.testing.assert_close(edited, direct, rtol=0, atol=1e-6)
    path = export_lora([delta], tmp_path / "l.safetensors", {"star": 0.7}, torch.float32, model_weights(DEMO))
    tensors, sites = load_file(path), shapes(demo_host.attention_layers())
    names = family_of(sites).kohya_names(sites)
    assert len(tensors) == 3 * len(sites)
    lora = {n: tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"] for n, key in names.items()}
    with changed(demo_host, lora):
        merged = demo_host.predict(x, t, context)
    assert (edited[0] - stock[0]).abs().max() > 0.05
    torch.testing.assert_close(merged, edited, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_checkpoint_is_the_edit(demo_host: DiffusersHost, made: dict[str, ConceptDelta], tmp_path: Path) -> None:
    """``W + W S Dᵀ`` rounded once, and the noise of the edited context up to that."""
    delta, out = made["context"], export_checkpoint([made["context"]], DEMO, tmp_path / "merged")
    before, after, s = model_weights(DEMO), model_weights(out), delta.up_factor("context")
    for name, weight in before.items():
        expected = weight.double() + weight.double() @ s.double() @ delta.down.double()
        assert (after[name].double() - expected).abs().max() <= torch.finfo(weight.dtype).eps * expected.abs().max()
    merged = DiffusersHost.load(str(out))
    x, t, context = inputs(demo_host)
    edited = demo_host.predict(x, t, Composition((delta,)).edit_context(context, torch.ones(1), gate=False))
    moved = edited - demo_host.predict(x, t, context)
    assert (merged.predict(x, t, context) - edited).norm() < 1e-3 * moved.norm()


def test_a_lora_needs_a_model(made: dict[str, ConceptDelta], tmp_path: Path) -> None:
    """One sentence without it, nothing written; and the model has to be one that reads this width."""
    path, out = made["context"].save(tmp_path / "star.safetensors"), tmp_path / "lora.safetensors"
    refused = CliRunner().invoke(app, ["export", str(path), "-o", str(out)])
    with pytest.raises(SepMEError, match="edits the context; as a LoRA it depends on a model's weights"):
        export_lora([made["context"]], out)
    assert refused.exit_code != 0
    assert not out.exists()
    wide = {name: torch.zeros(8, 768) for name in shapes_of(made["layers"])}
    with pytest.raises(SepMEError, match="edits contexts of 384 channels, but the model reads 768"):
        export_lora([made["context"]], out, weights=wide)
    assert not out.exists()
    assert CliRunner().invoke(app, ["export", str(path), "-o", str(out), "--model", "demo"]).exit_code == 0
    assert out.exists()


def shapes_of(delta: ConceptDelta) -> dict[str, tuple[int, int]]:
    return dict(delta.shapes)


@pytest.mark.parametrize("form", ["context", "both"])
def test_reprojected_in_its_own_form(form: str, demo_host: DiffusersHost, made: dict[str, ConceptDelta]) -> None:
    """The response on its own prompts stays, in the form that it had; what is recorded is what was read."""
    delta, layers = made[form], demo_host.attention_layers()
    new = reproject(planner_of(demo_host, "rocket"), delta, layers)
    assert set(new.up) == set(delta.up)
    assert new.info["reprojected"]["response_loss"] < 0.05
    assert "rocket" in [c.name for c in new.known]
    assert ("kv_fingerprint" in new.info) == bool(new.projections)
    assert new.facts.text_encoder == EncoderFingerprint.of(demo_host)
    own = demo_host.encode(["a star"]).context[0]
    for name in delta.up:
        before, after = own @ delta.weight_delta(name).T, own @ new.weight_delta(name).T
        assert (before - after).norm() < 0.1 * before.norm()


def test_order_of_newcomers(demo_host: DiffusersHost, made: dict[str, ConceptDelta]) -> None:
    book = ConceptBook((*CONCEPTS, *(Concept(n, (n, f"a {n}")) for n in ("moon", "sun"))))

    def of(known: ConceptBook) -> Planner:
        return Planner(demo_host, known, PlanOptions(), ())

    assert order_gap(made["context"], book, of, demo_host.attention_layers()) < 0.05


def test_its_lora_comes_back_as_a_per_layer_delta(demo_host: DiffusersHost, made: dict[str, ConceptDelta], tmp_path: Path) -> None:
    path = export_lora([made["context"]], tmp_path / "l.safetensors", dtype=torch.float32, weights=model_weights(DEMO))
    back = import_eraser(planner_of(demo_host), "star", path, demo_host.attention_layers())
    assert (back.shapes, back.edits_context) == (made["layers"].shapes, False)
    for name in back.projections:
        expected = made["layers"].up_factor(name)
        assert (back.up_factor(name) - expected).abs().max() < 5e-3 * expected.abs().max()


class Turned:
    """The embedded model's text encoder, changed."""

    def __init__(self, host: DiffusersHost, turn: torch.Tensor) -> None:
        self.host, self.turn = host, turn

    def encode(self, prompts: Any) -> Encoding:
        encoding = self.host.encode(prompts)
        return encoding._replace(context=encoding.context @ self.turn)


def test_another_text_encoder_is_refused(demo_host: DiffusersHost, made: dict[str, ConceptDelta]) -> None:
    delta, eye = made["context"], torch.eye(384)
    noise = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    assert check_encoder(demo_host, [delta]) == []
    (said,) = check_encoder(Turned(demo_host, eye + 0.01 * noise), [delta])
    assert "'star' was made with another version or layer (clip skip) of this text encoder" in said
    with pytest.raises(SepMEError, match="delta of 'star' was made with another text encoder"):
        check_encoder(Turned(demo_host, torch.linalg.qr(noise).Q), [delta])
    assert check_encoder(Turned(demo_host, torch.linalg.qr(noise).Q), [made["layers"]]) == []  # older files do not say
    (skipped,) = encoder_warnings([delta], 1)
    assert "0 of CLIP's last layers skipped, here 1" in skipped


def test_the_command_line_says_what_a_file_edits(made: dict[str, ConceptDelta], tmp_path: Path) -> None:
    path = made["context"].save(tmp_path / "star.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert "star: edits the context: fits any model with this text encoder (any model with a text encoder of 384 channels)" in shown
    (data,) = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert (data["projections"], data["architecture"]) == (0, "context-384")
    checked = CliRunner().invoke(app, ["verify", "demo", str(path), "--nearby", "8"])
    assert checked.exit_code == 0, checked.output
    assert "Warning" not in checked.output
    far = EncoderFingerprint(384, tuple(-v for v in made["context"].facts.text_encoder.figures))  # type: ignore[union-attr]
    replace(made["context"], info=made["context"].info | {"text_encoder": far.to_json()}).save(path)
    refused = CliRunner().invoke(app, ["verify", "demo", str(path), "--nearby", "8"])
    assert isinstance(refused.exception, SepMEError)
    assert "another text encoder" in str(refused.exception)


def test_a_text_encoder_is_enough(made: dict[str, ConceptDelta], tmp_path: Path) -> None:
    """Without a model the same file is made, and it says which encoder it is for; what needs a model says so in one sentence."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(DEMO / part, tmp_path / "encoder" / part)
    book = tmp_path / "book.json"
    book.write_text(ConceptBook((Concept("star", ("star", "a star")),)).dumps(), encoding="utf-8")
    closed = ["--objective", "closed-form", "--edit", "context", "--nearby", "20", "--no-thumbnail"]  # only a whole model draws
    for model, out in (("demo", "whole"), (tmp_path / "encoder", "alone")):
        trained = CliRunner().invoke(app, ["train", str(model), str(book), "-o", str(tmp_path / out), *closed])
        assert trained.exit_code == 0, trained.output
    alone = ConceptDelta.load(tmp_path / "alone" / "star.safetensors")
    assert alone.to_bytes() == (tmp_path / "whole" / "star.safetensors").read_bytes()
    for command in (["train", "{}", str(book), "-o", str(tmp_path)], ["generate", "{}", "a star", "-o", str(tmp_path / "x.png")]):
        refused = CliRunner().invoke(app, [c.format(tmp_path / "encoder") for c in command])
        assert "holds text encoders and no model" in str(refused.exception)
    assert clip_of_width(alone.d_in) == ""
    assert [clip_of_width(w) for w in (768, 1024, 2048)] == ["CLIP-L", "OpenCLIP-H", "CLIP-L and OpenCLIP-G side by side"]
    named = replace(
        made["context"], info=made["context"].info | {"text_encoder": replace(alone.facts.text_encoder, name="CLIP-L").to_json()}
    )
    assert named.edits.startswith("edits the context: fits any model with CLIP-L (")


@torch.no_grad()
def test_acting_is_what_generation_does(demo_host: DiffusersHost, made: dict[str, ConceptDelta], tulip: ConceptDelta) -> None:
    """The denoiser itself edits what it is given, per-layer deltas beside it read that unedited, and it is left as it was."""
    x, t = demo_host.latents([0, 1, 2]), torch.tensor([500, 500, 500])
    context = demo_host.encode(["a star", "a star and a tulip", ""]).context
    stock = demo_host.predict(x, t, context)
    with Separable([made["layers"], tulip]).acting(demo_host, ["star", "tulip"], True):
        expected = demo_host.predict(x, t, context)
    with Separable([made["context"], tulip]).acting(demo_host, ["star", "tulip"], True):
        mixed = demo_host.predict(x, t, context)
    assert (expected[:2] - stock[:2]).abs().amax() > 0.05
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-3)
    assert torch.equal(mixed[2], stock[2])
    assert torch.equal(demo_host.predict(x, t, context), stock)
    with torch.enable_grad(), Separable([made["context"]]).acting(demo_host, ["star"], True):
        free = context.clone().requires_grad_(True)
        demo_host.predict(x, t, free)[0].square().sum().backward()
    assert free.grad is not None
    assert free.grad[0].abs().max() > 0
    assert "predict" not in vars(demo_host)
