"""Erasers of others as deltas, merged checkpoints, later concepts: round trips through real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm_files
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from sepme import cli
from sepme.concepts import Concept, ConceptBook
from sepme.convert import export_checkpoint, export_lora, import_eraser, known_to, order_gap, reproject
from sepme.convert.foreign import read_foreign
from sepme.convert.refit import refit, response_gap
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.hosts.diffusers import DiffusersHost
from sepme.model.layers import projections, unet_layers, weights
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import ratios
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta

ORDINARY = ("a cat", "a big dog", "big house", "a red tree", "a photo of a dog", "blue")
CONCEPTS = {n: Concept(n, (n, f"a {n}")) for n in ("star", "circle", "moon")}
CLOSED = TrainOptions(objective="closed-form")


def book_of(*names: str) -> ConceptBook:
    return ConceptBook(tuple(CONCEPTS[n] for n in names), ("a photo of a house",))


def planner_of(host: Any, *names: str) -> Planner:
    return Planner(host, book_of(*names), PlanOptions(mode="exact", max_rank=4, energy=0.999), ORDINARY)


@pytest.fixture(scope="module")
def planner(host: Any) -> Planner:
    return planner_of(host, "star", "circle")


@pytest.fixture(scope="module")
def star(planner: Planner, host: Any) -> ConceptDelta:
    return make_delta(planner, "star", host, CLOSED)


def theirs(host: Any) -> dict[str, str]:
    """diffusers' module names by projection name."""
    by_module = {id(m): n for n, m in host.unet.named_modules()}
    return {f"{ldm}.{p}": f"{by_module[id(layer)]}.{p}" for ldm, layer in unet_layers(host.unet).items() for p in ("to_k", "to_v")}


def lora_files(host: Any, delta: ConceptDelta, folder: Path) -> dict[str, Path]:
    """The same LoRA under every naming that is read, at scales that each layout states in its own way."""
    names = theirs(host)
    factors = {n: (delta.down.clone(), delta.up_factor(n).contiguous()) for n in names}
    old = {n: m.replace(".to_", ".processor.to_") + "_lora" for n, m in names.items()}
    layouts: dict[str, dict[str, Tensor]] = {
        "peft": {f"base_model.model.{m}.lora_{f}.weight": t for n, m in names.items() for f, t in zip("AB", factors[n], strict=True)},
        "diffusers": {f"unet.{m}.lora_{f}.weight": t for n, m in names.items() for f, t in zip("AB", factors[n], strict=True)},
        "processor": {f"unet.{m}.{f}.weight": t for n, m in old.items() for f, t in zip(("down", "up"), factors[n], strict=True)},
        "ldm": {
            f"lora_unet_{n.replace('.', '_')}.lora_{f}.weight": t
            for n in names
            for f, t in zip(("down", "up"), (factors[n][0], 2 * factors[n][1]), strict=True)
        },
    }
    layouts["ldm"] |= {f"lora_unet_{n.replace('.', '_')}.alpha": torch.tensor(delta.rank / 2) for n in names}
    layouts["diffusers"]["text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_A.weight"] = torch.ones(2, 4)
    paths = {}
    for kind, tensors in layouts.items():
        (folder / kind).mkdir()
        paths[kind] = folder / kind / ("adapter_model.safetensors" if kind == "peft" else "lora.safetensors")
        save_file({k: v.clone() for k, v in tensors.items()}, paths[kind])
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": delta.rank, "lora_alpha": delta.rank}))
    paths["kohya"] = export_lora([delta], folder / "kohya.safetensors", dtype=torch.float32)
    return paths


def test_every_lora_layout_comes_back(host: Any, planner: Planner, star: ConceptDelta, tmp_path: Path) -> None:
    """Imported against the same book, a delta exported to LoRA has the same D, and the same Y up to float16."""
    for kind, path in lora_files(host, star, tmp_path).items():
        back = import_eraser(planner, "star", path, host.attention_layers())
        assert torch.equal(back.down, star.down), kind
        assert back.gate == star.gate
        for name in star.up:
            expected = star.up_factor(name)
            assert (back.up_factor(name) - expected).abs().max() <= 2e-3 * expected.abs().max(), kind
        facts = back.info["imported"]
        assert facts["response_loss"] < 2e-3
        assert facts["kind"] == "lora"
        assert facts["own_scale"] == (kind in ("peft", "ldm", "kohya"))
        assert facts["other_tensors"] == (1 if kind == "diffusers" else 0)
        assert back.info["certificate"] == star.info["certificate"]
        back.save(tmp_path / "back.safetensors")
        assert ConceptDelta.load(tmp_path / "back.safetensors").to_bytes() == back.to_bytes()


def test_peft_writes_what_is_read(host: Any, make_host: Callable[..., Any], planner: Planner, star: ConceptDelta, tmp_path: Path) -> None:
    """Files that diffusers itself writes, at another alpha than the rank; its metadata says so."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    trained = make_host()
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
    trained.unet.add_adapter(config)
    for name, module in projections(trained.attention_layers()).items():
        module.lora_A["default"].weight.data.copy_(star.down[:4])
        module.lora_B["default"].weight.data.copy_(2 * star.up_factor(name)[:, :4])
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(trained.unet))
    metadata = trained.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    back = import_eraser(planner, "star", next(tmp_path.glob("*.safetensors")), host.attention_layers())
    assert back.info["imported"]["own_scale"]
    for name in star.up:
        assert (back.weight_delta(name) - star.weight_delta(name)).abs().max() <= 2e-3 * star.weight_delta(name).abs().max()


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_come_back(host: Any, planner: Planner, star: ConceptDelta, dtype: torch.dtype, partial: bool, tmp_path: Path) -> None:
    """ESD's and UCE's files: parameters by diffusers' names, all of them or only some; half precision rounds, no more."""
    names = theirs(host)
    own = {f"{m}.weight": (weights(host.attention_layers())[n] + star.weight_delta(n)).to(dtype) for n, m in names.items()}
    if partial:
        own = {k: v for k, v in own.items() if k.endswith("to_v.weight")}
    else:
        own = {k: v.to(dtype) for k, v in host.unet.state_dict().items()} | own
    save_file({k: v.contiguous().clone() for k, v in own.items()}, tmp_path / "esd.safetensors")
    back = import_eraser(planner, "star", tmp_path / "esd.safetensors", host.attention_layers())
    facts = back.info["imported"]
    assert facts["kind"] == "weights"
    assert facts["other_tensors"] == (0 if partial else len(host.unet.state_dict()) - len(names))
    assert facts["response_loss"] < (2e-3 if dtype is torch.float32 else 0.05)
    for name in star.up:
        expected = torch.zeros_like(star.up_factor(name)) if partial and name.endswith("to_k") else star.up_factor(name)
        assert (back.up_factor(name) - expected).abs().max() <= 0.02 * star.up_factor(name).abs().max()


def test_an_unseparable_eraser_becomes_separable(host: Any, planner: Planner, tmp_path: Path) -> None:
    """A random full-rank change: what it did to the other concept is gone, what it did to its own is refitted, the loss is stated."""
    generator = torch.Generator().manual_seed(4)
    changes = {n: 0.2 * torch.randn(w.shape, generator=generator) for n, w in weights(host.attention_layers()).items()}
    own = {f"{m}.weight": weights(host.attention_layers())[n] + changes[n] for n, m in theirs(host).items()}
    save_file(own, tmp_path / "esd.safetensors")
    delta = import_eraser(planner, "star", tmp_path / "esd.safetensors", host.attention_layers())
    tokens, circle = planner.prompts.tokens("star")[0].float(), planner.prompts.encodings["circle"].context.flatten(0, 1)
    lost = whole = 0.0
    for name, change in changes.items():
        before, after = tokens @ change.T, tokens @ delta.weight_delta(name).T
        lost, whole = lost + float((before - after).square().sum()), whole + float(before.square().sum())
        assert (circle @ delta.weight_delta(name).T).abs().max() <= 1e-3 * (circle @ change.T).abs().max()
    assert delta.info["imported"]["response_loss"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0 < delta.info["imported"]["response_loss"] < 1


def test_refit_is_least_squares() -> None:
    """Against the solution of the normal equations, in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, change = torch.randn(40, 12, generator=generator, dtype=torch.float64), torch.randn(5, 12, generator=generator)
    down = torch.linalg.qr(torch.randn(12, 3, generator=generator)).Q.T
    up, loss = refit([("x", change)], tokens, down)
    h, r = tokens @ down.double().T, tokens @ change.double().T
    expected = torch.linalg.solve(h.T @ h, h.T @ r).T
    torch.testing.assert_close(up["x"].double(), expected, rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(float((r - h @ expected.T).norm() / r.norm()), rel=1e-5)


# --- merged checkpoints


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", ldm_files.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_file_merged(kind: str, dtype: torch.dtype, make_random_delta: Callable[..., ConceptDelta], tmp_path: Path) -> None:
    """The same keys, shapes and types; K and V changed by Σ s ΔW, all else byte-identical; imported back as a difference."""
    pipe = ldm_files.pipeline(kind)
    kv = weights(unet_layers(pipe.unet))
    shapes = {n: (w.shape[0], w.shape[1]) for n, w in kv.items()}
    deltas = [make_random_delta("star", shapes, seed=1, size=0.1), make_random_delta("moon", shapes, seed=2, size=0.1)]
    model = ldm_files.save_single_file(
        pipe.to(dtype), kind, tmp_path / "model.safetensors", {"modelspec.title": "x", "sshs_model_hash": "y"}
    )
    out = export_checkpoint(deltas, model, tmp_path / "merged.safetensors", {"moon": 0.5})
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"model.diffusion_model.{n}.weight" for n in kv}
    for name in kv:
        key = f"model.diffusion_model.{name}.weight"
        expected = before[key].float() + (deltas[0].weight_delta(name) + 0.5 * deltas[1].weight_delta(name))
        assert torch.equal(after[key], expected.to(dtype))
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "x"
    assert metadata["sepme.gate"].startswith("off")
    assert "sshs_model_hash" not in metadata
    foreign = read_foreign(out, weights(unet_layers(pipe.unet)))
    assert set(foreign.changes) == set(kv)
    assert foreign.others == len(before) - len(kv)


def test_folder_merged(make_host: Callable[..., Any], star: ConceptDelta, planner: Planner, tmp_path: Path) -> None:
    """A diffusers folder: loads like the original, draws what the linear delta draws, and imports back."""
    host = make_host()
    host.pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "unet" / "old.bin").write_bytes(b"pickle")
    out = export_checkpoint([star], tmp_path / "model", tmp_path / "new" / "merged")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["merged"]
    assert not (out / "unet" / "old.bin").exists()
    merged = DiffusersHost.load(str(out))
    for name, weight in weights(merged.attention_layers()).items():
        assert torch.equal(weight, weights(host.attention_layers())[name] + star.weight_delta(name))
    for part in ("vae", "text_encoder"):
        assert (
            load_file(next((out / part).glob("*.safetensors"))).keys()
            == load_file(next((tmp_path / "model" / part).glob("*.safetensors"))).keys()
        )
    back = import_eraser(planner, "star", out / "unet" / "diffusion_pytorch_model.safetensors", host.attention_layers())
    assert back.info["imported"]["response_loss"] < 2e-3
    with pytest.raises(SepMEError, match="there already"):
        export_checkpoint([star], tmp_path / "model", out)


def test_sharded_folder(make_host: Callable[..., Any], star: ConceptDelta, tmp_path: Path) -> None:
    host = make_host()
    host.pipe.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 2
    merged = DiffusersHost.load(str(export_checkpoint([star], tmp_path / "model", tmp_path / "merged")))
    for name, weight in weights(merged.attention_layers()).items():
        assert torch.equal(weight, weights(host.attention_layers())[name] + star.weight_delta(name))


# --- concepts that came later


def test_reprojection_spares_the_newcomer(host: Any) -> None:
    """D of {star} leaks on circle; reprojected, it is the D of {star, circle}, in whatever order they came."""
    alone = make_delta(planner_of(host, "star"), "star", host, CLOSED)
    planner = planner_of(host, "star", "circle")
    circle = planner.prompts.encodings["circle"].context
    new = reproject(planner, alone, host.attention_layers())
    assert float(ratios(circle, alone.down).max()) > 0.01
    assert float(ratios(circle, new.down).max()) < 1e-5
    assert torch.equal(new.down, make_delta(planner, "star", host, CLOSED).down)
    reverse = reproject(planner_of(host, "circle", "star"), alone, host.attention_layers())
    torch.testing.assert_close(new.down.T @ new.down, reverse.down.T @ reverse.down, rtol=0, atol=1e-5)  # the same span
    assert new.info["certificate"] == planner.plan("star").certificate.to_json()
    facts = new.info["reprojected"]
    assert facts["from"] == alone.content_hash()
    assert 0 < facts["response_loss"] < 0.9
    assert new.info["objective"]["name"] == "closed-form"


def test_reprojecting_against_what_was_known_changes_nothing(host: Any, planner: Planner, star: ConceptDelta) -> None:
    new = reproject(planner, star, host.attention_layers())
    assert torch.equal(new.down, star.down)
    assert response_gap(star, new, planner.prompts.tokens("star")[0]) < 1e-3
    assert new.info["reprojected"]["response_loss"] < 1e-3


def test_order_of_arrival(host: Any) -> None:
    """circle, then moon, or the other way round: the same D, and the gap in Y that is reported is the one measured here."""
    layers = host.attention_layers()
    alone = make_delta(planner_of(host, "star"), "star", host, CLOSED)
    both = planner_of(host, "star", "circle", "moon")
    one, other = (reproject(both, reproject(planner_of(host, "star", n), alone, layers), layers) for n in ("circle", "moon"))
    assert torch.equal(one.down, other.down)
    c = both.prompts.encodings["star"].context.flatten(0, 1)
    gap = sum(float((c @ (one.weight_delta(n) - other.weight_delta(n)).T).square().sum()) for n in one.up)
    whole = sum(float((c @ one.weight_delta(n).T).square().sum()) for n in one.up)
    calls: list[tuple[str, ...]] = []

    def of(book: ConceptBook) -> Planner:
        calls.append(tuple(x.name for x in book.concepts))
        return planner_of(host, *calls[-1])

    reported = order_gap(alone, book_of("star", "circle", "moon"), of, layers)
    assert reported == pytest.approx((gap / whole) ** 0.5, rel=1e-3, abs=1e-6)
    assert reported < 0.5
    assert calls == [("star", "circle"), ("star", "circle", "moon"), ("star", "moon"), ("star", "circle", "moon")]


def test_what_is_known_by_now(host: Any, star: ConceptDelta) -> None:
    """Stored prompts win, the book's order holds, what only a delta knows is kept."""
    book = known_to([star], ConceptBook((Concept("moon", ("moon",)), Concept("STAR", ("a big star",)))))
    assert [c.name for c in book.concepts] == ["moon", "star", "circle"]
    assert book["star"].prompts == ("star", "a star")
    assert book.preserve == ("a photo of a house",)


# --- refusals


def test_files_that_cannot_be_imported(host: Any, planner: Planner, star: ConceptDelta, tmp_path: Path) -> None:
    names, base = theirs(host), weights(host.attention_layers())
    name, module = next(iter(names.items()))
    w = base[name].clone()
    down, up = torch.ones(2, w.shape[1]), torch.ones(w.shape[0], 2)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "same": ({f"{module}.weight": w}, "the same to_k and to_v"),
        "shape": ({f"{module}.weight": w[:, :-1].contiguous()}, "has shape"),
        "nan": ({f"{module}.weight": w * float("nan")}, "NaN"),
        "foreign": ({"conv.weight": w}, "no to_k or to_v"),
        "one factor": ({f"unet.{module}.lora_A.weight": down}, "lacks one of its two factors"),
        "other model": ({f"unet.{module}.lora_A.weight": down[:, 1:].clone(), f"unet.{module}.lora_B.weight": up}, "for another model"),
        "zero": ({f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": 0 * up}, "changes neither"),
        "loha": ({f"lora_unet_{module.replace('.', '_')}.hada_w1_a": down}, "only plain LoRA"),
        "dora": ({f"unet.{module}.dora_scale": down}, "only plain LoRA"),
        "alpha": (
            {
                f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up,
                f"unet.{module}.alpha": torch.tensor(float("inf")),
            },
            "NaN or infinite",
        ),
        "alpha of two": (
            {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up, f"unet.{module}.alpha": torch.ones(2)}, "one",
        ),
        "fp8": ({f"{module}.weight": w.to(torch.float8_e4m3fn)}, r"quantised \(F8_E4M3"),
        "fp8 LoRA": (
            {f"unet.{module}.lora_A.weight": down.to(torch.float8_e5m2), f"unet.{module}.lora_B.weight": up.to(torch.float8_e5m2)},
            r"quantised \(F8_E5M2",
        ),
        "int8": ({f"{module}.weight": (w * 100).to(torch.int8)}, r"quantised \(I8"),
    }  # fmt: skip
    for case, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(SepMEError, match=message):
            import_eraser(planner, "star", tmp_path / "x.safetensors", host.attention_layers())
        assert case
    path = export_lora([star], tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SepMEError, match="cut short"):
        read_foreign(path, base)
    with pytest.raises(SepMEError, match="pickle"):
        read_foreign(tmp_path / "x.pt", base)


def test_nothing_is_written_over_what_is_read(make_host: Callable[..., Any], star: ConceptDelta, tmp_path: Path) -> None:
    """Nor over any delta, or into the model's folder."""
    delta, other = (ConceptDelta.load(star.save(tmp_path / f"{name}.safetensors")) for name in ("star", "other"))
    for place in (Path(delta.file), Path(other.file)):
        with pytest.raises(SepMEError, match=r"what this command reads|holds the delta of 'star'"):
            export_lora([delta], place)
    (tmp_path / "link.safetensors").symlink_to(delta.file)
    with pytest.raises(SepMEError, match="what this command reads"):
        export_lora([delta], tmp_path / "link.safetensors")
    make_host().pipe.save_pretrained(tmp_path / "model")
    for place in (tmp_path / "model", tmp_path / "model" / "unet", tmp_path / "model" / "merged"):
        with pytest.raises(SepMEError, match="the model itself or lies in it"):
            export_checkpoint([delta], tmp_path / "model", place)
    assert ConceptDelta.load(delta.file).content_hash() == star.content_hash()
    lora = export_lora([delta], tmp_path / "lora.safetensors")
    assert export_lora([delta], lora, {"star": 0.5}) == lora  # its own earlier export


def test_models_that_cannot_be_merged_into(make_host: Callable[..., Any], star: ConceptDelta, tmp_path: Path) -> None:
    model = ldm_files.save_single_file(ldm_files.pipeline("sd1"), "sd1", tmp_path / "model.safetensors")
    with pytest.raises(SepMEError, match="no model of the architecture"):
        export_checkpoint([star], model, tmp_path / "merged.safetensors")
    make_host().pipe.save_pretrained(tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "unet")
    for source, target, message in (
        (tmp_path / "folder", tmp_path / "out", "no diffusers folder"),
        (tmp_path / "nowhere.safetensors", tmp_path / "out.safetensors", "check the path"),
        (model, tmp_path / "out.ckpt", r"end it in \.safetensors"),
        (tmp_path / "model.ckpt", tmp_path / "out.safetensors", "pickle"),
    ):
        with pytest.raises(SepMEError, match=message):
            export_checkpoint([star], source, target)
    for cut in (4, 100, model.stat().st_size - 5):
        (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:cut])
        with pytest.raises(SepMEError, match="cut short"):
            export_checkpoint([star], tmp_path / "cut.safetensors", tmp_path / "out.safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]


def test_overflow_is_refused(make_random_delta: Callable[..., ConceptDelta], tmp_path: Path) -> None:
    pipe = ldm_files.pipeline("sd1")
    shapes = {n: (w.shape[0], w.shape[1]) for n, w in weights(unet_layers(pipe.unet)).items()}
    model = ldm_files.save_single_file(pipe.to(torch.float16), "sd1", tmp_path / "model.safetensors")
    with pytest.raises(SepMEError, match="would overflow F16"):
        export_checkpoint([make_random_delta("star", shapes, size=1e6)], model, tmp_path / "out.safetensors")
    with pytest.raises(SepMEError, match="is what this command reads"):
        export_checkpoint([make_random_delta("star", shapes)], model, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


# --- command line


def test_command_line(host: Any, star: ConceptDelta, tmp_path: Path) -> None:
    """train, export to both, import back, reproject; --json and the note about the gate."""
    host.pipe.save_pretrained(tmp_path / "model")
    star.save(tmp_path / "star.safetensors")
    book = tmp_path / "book.yaml"
    book.write_text(
        "concepts:\n- {name: star, prompts: [star, a star]}\n- {name: moon, prompts: [moon]}\n- {name: sun, prompts: [a red sun]}\n"
    )
    model, delta = str(tmp_path / "model"), str(tmp_path / "star.safetensors")

    def run(*command: str) -> Any:
        result = CliRunner().invoke(cli.app, [*command, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    lora, merged = str(tmp_path / "lora.safetensors"), str(tmp_path / "merged")
    assert run("export", delta, "--to", "lora", "-o", lora, "--erase", "star:0.5")["strengths"] == {"star": 0.5}
    run("export", delta, "--to", "checkpoint", "--model", model, "-o", merged)
    space = ["--null-space", "exact", "--max-rank", "4"]
    row = run("import", model, lora, "--as", "star", "-o", str(tmp_path / "back.safetensors"), "--against", str(book), *space)
    assert row["imported"]["kind"] == "lora"
    weights_file = str(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    row = run("import", model, weights_file, "--as", "Tree", "--prompt", "a tree", "-o", str(tmp_path / "tree.safetensors"), *space)
    assert ConceptDelta.load(tmp_path / "tree.safetensors").concept == Concept("Tree", ("a tree",))
    rows = run("reproject", model, delta, "--against", str(book), "-o", str(tmp_path / "new"), "--order-gap", *space)["deltas"]
    assert rows[0]["leakage_before"] > 1e-2 > 2**-8 > rows[0]["leakage_linear_max"]  # which counts rounding to bfloat16
    assert 0 <= rows[0]["order_gap"] < 1
    for command in (["export", delta, "--to", "zip", "-o", lora], ["export", delta, "--to", "checkpoint", "-o", lora]):
        with pytest.raises(SepMEError):
            CliRunner().invoke(cli.app, command, catch_exceptions=False)
