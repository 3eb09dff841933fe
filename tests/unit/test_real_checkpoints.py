"""Stable Diffusion 1.x, 2.x and XL as diffusers folders and single files: small random models in the true layouts and key names."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ldm_files
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from sepme import cli
from sepme.apply.composition import Composition
from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.hosts import ldm, loading, tokenizers
from sepme.hosts.diffusers import DiffusersHost, LoadOptions
from sepme.model.families.unet import diffusers_to_ldm
from sepme.model.layers import architecture, kv_fingerprint
from sepme.plan.directions import PlanOptions
from sepme.plan.gate import ordinary_prompts
from sepme.plan.planner import Planner
from sepme.plan.pooled import Pooled
from sepme.train import TrainOptions, make_delta
from sepme.train.objectives.closed_form import solve

PLAN = PlanOptions(tolerance=0.02)
BOOK = ConceptBook((Concept("star", ("star",)), Concept("moon", ("moon",))), ("tree",))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``models(kind)``: (folder, single file) of a random model, written once."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(kind: str) -> tuple[Path, Path]:
        pipe = ldm_files.pipeline(kind)
        pipe.save_pretrained(root / kind)
        return root / kind, ldm_files.save_single_file(pipe, kind, root / f"{kind}.safetensors")

    return make


@pytest.fixture(scope="module")
def hosts(models: Any) -> Any:
    """``hosts(kind, form)``: the loaded model, form ``folder`` or ``file``."""

    @cache
    def load(kind: str, form: str) -> DiffusersHost:
        folder, file = models(kind)
        options = LoadOptions(tokenizer=str(folder), prediction="epsilon", size=64)
        return DiffusersHost.load(str(folder if form == "folder" else file), options=options)

    return load


@pytest.fixture(scope="module")
def planners(hosts: Any) -> Any:
    return cache(lambda kind: Planner(hosts(kind, "folder"), BOOK, PLAN, ordinary_prompts()[::60]))


@pytest.mark.parametrize("kind", ldm_files.KINDS)
def test_a_folder_and_its_single_file_are_the_same_model(hosts: Any, kind: str) -> None:
    folder, file = hosts(kind, "folder"), hosts(kind, "file")
    assert kv_fingerprint(folder.attention_layers()) == kv_fingerprint(file.attention_layers())
    for ours, theirs in zip(folder.encode(["star", ""]), file.encode(["star", ""]), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    sampled = [host.generate(["star"], [1], steps=2) for host in (folder, file)]
    assert torch.equal(*sampled)
    assert sampled[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("kind", ldm_files.KINDS)
@pytest.mark.parametrize("objective", ["gcirs", "closed-form"])
def test_erases_restores_and_leaves_others_alone(hosts: Any, planners: Any, kind: str, form: str, objective: str) -> None:
    host, planner = hosts(kind, form), planners(kind)
    options = TrainOptions.for_mode(objective=objective, steps=2, batch=1, trajectories=1)
    deltas = tuple(make_delta(planner, n, host, options) for n in ("star", "moon"))
    composition, prompts = Composition(deltas), ["star", "moon", "tree"]

    def draw(*args: Any) -> torch.Tensor:
        return host.generate(prompts, [1, 2, 3], *args, steps=2, latents_only=True)

    stock = draw()
    assert torch.equal(draw(composition, {"star": 0.0, "moon": 0.0}), stock)
    one = draw(composition, {"star": 1.0, "moon": 0.0})
    assert torch.equal(one[1:], stock[1:])
    assert not torch.equal(one[0], stock[0])
    both = draw(composition)
    torch.testing.assert_close(both[0], one[0], rtol=1e-3, atol=1e-4)  # the same sum over more columns
    assert torch.equal(both[2], stock[2])
    assert not torch.equal(both[1], stock[1])
    assert torch.equal(draw(), stock)
    assert len(deltas[0].up) == 2 * len(host.attention_layers()) == {"sd1": 32, "sd2": 32, "sdxl": 140}[kind]


def test_sdxl_reads_both_encoders_and_the_pooled_vector_as_diffusers_does(hosts: Any) -> None:
    host = hosts("sdxl", "folder")
    context, _, pooled, _ = host.pipe.encode_prompt("a star", do_classifier_free_guidance=False)
    ours = host.encode(["a star"])
    assert torch.equal(ours.context, context)
    assert torch.equal(ours.pooled, pooled)
    with pytest.raises(SepMEError, match="pooled"):
        host.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1]), context)


def test_v_prediction_becomes_epsilon_by_the_schedulers_formula(hosts: Any) -> None:
    host = hosts("sd2", "folder")
    context, x, t = host.encode(["star", "moon"]).context, torch.randn(2, 4, 8, 8), torch.tensor([981, 241])
    raw = host.predict(x, t, context)
    host.prediction = "v_prediction"
    try:
        noise = host.predict(x, t, context)
    finally:
        host.prediction = "epsilon"
    for row, step in enumerate(t):
        steps = []
        for kind, out in (("v_prediction", raw), ("epsilon", noise)):
            scheduler = type(host.scheduler).from_config(host.scheduler.config, prediction_type=kind)
            scheduler.set_timesteps(50)
            steps.append(scheduler.step(out[row], step, x[row]).prev_sample)
        torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(raw, noise)


def test_what_sd2_predicts_is_declared_or_probed(models: Any, tmp_path: Path) -> None:
    folder, file = models("sd2")
    save_file(load_file(file), tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    host = DiffusersHost.load(str(tmp_path / "v.safetensors"), options=LoadOptions(tokenizer=str(folder)))
    assert (host.prediction, host.side) == ("v_prediction", 96)
    pipe = host.pipe
    assert loading.probe_prediction(pipe) == "v_prediction"  # a random UNet does not return its input
    parts = {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder, "scheduler": pipe.scheduler}

    class Echo(nn.Linear):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(sample=0.9 * x)

    assert loading.probe_prediction(SimpleNamespace(unet=Echo(1, 1), **parts)) == "epsilon"


def test_the_pooled_vector_is_replaced_only_in_touched_rows(hosts: Any, planners: Any, tmp_path: Path) -> None:
    host, planner = hosts("sdxl", "folder"), planners("sdxl")
    delta = make_delta(planner, "star", host, TrainOptions.for_mode(objective="closed-form"))
    facts = delta.info["certificate"]["pooled"]
    assert facts["mode"] == "replaced"
    assert facts["residual"] < 1
    again = ConceptDelta.load(delta.save(tmp_path / "star.safetensors"))
    assert again.content_hash() == delta.content_hash()
    assert torch.equal(again.pooled.anchor, delta.pooled.anchor)
    seen = host.encode(["star", "tree", ""])
    new = Composition((again,)).replace_pooled(seen.pooled, seen.context, torch.ones(1))
    assert torch.equal(new[1:], seen.pooled[1:])
    assert (new[0] - seen.pooled[2]).norm() < (seen.pooled[0] - seen.pooled[2]).norm()
    left = Planner(host, BOOK, PlanOptions(tolerance=0.02, pooled="leave"), ()).plan("star")
    assert left.pooled is None
    assert left.certificate.pooled == {"mode": "left", "residual": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled.anchor": None}, "pooled.anchor"),
        ({"pooled.down": None}, "pooled.down"),
        ({"pooled.anchor": torch.zeros(3)}, "pooled.anchor"),
        ({"pooled.down": torch.zeros(2, 5, dtype=torch.float16)}, "pooled.down"),
        ({"pooled.down": torch.full((2, 5), float("nan"))}, "NaN"),
        ({"pooled.other": torch.zeros(2)}, "foreign tensor"),
    ],
)
def test_a_broken_pooled_part_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    up = {"middle_block.1.transformer_blocks.0.attn2.to_k": torch.ones(3, 2)}
    delta = ConceptDelta.from_factors(Concept("star"), torch.eye(2, 4), up, 0.1, {}, Pooled(torch.eye(2, 5), torch.zeros(2)))
    tensors = {k: v for k, v in (delta.tensors() | change).items() if v is not None}
    (tmp_path / "d.safetensors").write_bytes(save(tensors, metadata=delta.metadata()))
    with pytest.raises(SepMEError, match=message):
        ConceptDelta.load(tmp_path / "d.safetensors")


def test_a_full_width_sd15_stack_takes_half_a_megabyte() -> None:
    names = diffusers_to_ldm([[1, 1], [1, 1], [1, 1], [0, 0]], 1, [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]).values()
    width = dict(zip(names, [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3, strict=True))
    generator = torch.Generator().manual_seed(0)
    weights = {f"{n}.{p}": torch.randn(w, 768, generator=generator) / 28 for n, w in width.items() for p in ("to_k", "to_v")}
    tokens, down = torch.randn(154, 768, generator=generator), torch.linalg.qr(torch.randn(768, 8, generator=generator)).Q.T
    delta = ConceptDelta.from_factors(Concept("van gogh"), down, solve(weights, tokens, torch.zeros_like(tokens), down), 0.1, {})
    assert architecture(delta.shapes) == "sd15"
    assert delta.shapes == {n: tuple(w.shape) for n, w in weights.items()}
    assert len(delta.to_bytes()) <= 500_000


def header_only(path: Path, shapes: dict[str, tuple[int, ...]], cut: int = 0) -> Path:
    """A sparse file that declares float16 tensors of these shapes."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset - cut)
    return path


U = "model.diffusion_model."
UNET = {f"{U}input_blocks.0.0.weight": (32, 4, 3, 3), f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 768)}
WHOLE = UNET | {"first_stage_model.decoder.conv_in.weight": (1,), "cond_stage_model.transformer.text_model.x": (1,)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 300_000)}, "Flux"),
        ({f"{U}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
        (WHOLE | {"conditioner.embedders.0.model.ln_final.weight": (8,)}, "refiner"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (8, 8)}, "LoRA"),
        ({"some.weight": (8, 8)}, "holds no Stable Diffusion UNet"),
        (WHOLE | {f"{U}input_blocks.0.0.weight": (32, 9, 3, 3)}, "9 latent channels"),
        (UNET, "VAE"),
        (UNET | {"first_stage_model.decoder.conv_in.weight": (1,)}, "text encoder"),
        (WHOLE | {f"{U}label_emb.0.0.weight": (8, 8)}, "both text encoders"),
        (WHOLE, "lacks the tensor"),
    ],
)
def test_other_files_get_one_sentence(models: Any, tmp_path: Path, shapes: Any, message: str) -> None:
    path = header_only(tmp_path / "model.safetensors", shapes)  # the Flux one claims 5 GB: only its header may be read
    with pytest.raises(SepMEError, match=message) as caught:
        loading.load_pipeline(str(path), LoadOptions(tokenizer=str(models("sd1")[0])))
    assert "\n" not in str(caught.value)


def test_clip_without_text_model_in_its_keys(models: Any, hosts: Any, tmp_path: Path) -> None:
    """As some tools write SD 1.x: the same model."""
    folder, file = models("sd1")
    save_file({key.replace(".text_model.", "."): value for key, value in load_file(file).items()}, tmp_path / "bare.safetensors")
    bare = DiffusersHost.load(str(tmp_path / "bare.safetensors"), options=LoadOptions(tokenizer=str(folder), size=64))
    assert torch.equal(bare.encode(["star"]).context, hosts("sd1", "file").encode(["star"]).context)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("part", ["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight", "token_embedding.weight"])
def test_quantised_single_files_are_refused(models: Any, tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    """Their weights are no plain numbers."""
    folder, file = models("sd1")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(part))
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "small.safetensors")
    with pytest.raises(SepMEError, match="is quantised"):
        loading.load_pipeline(str(tmp_path / "small.safetensors"), LoadOptions(tokenizer=str(folder)))


def test_quantised_folders_are_refused(models: Any, tmp_path: Path) -> None:
    shutil.copytree(models("sd1")[0], tmp_path / "small")
    (file,) = (tmp_path / "small" / "unet").glob("*.safetensors")
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}, file)
    with pytest.raises(SepMEError, match="is quantised"):
        loading.load_pipeline(str(tmp_path / "small"), LoadOptions())


def test_damaged_files_get_one_sentence(models: Any, tmp_path: Path) -> None:
    folder, file = models("sd1")
    options = LoadOptions(tokenizer=str(folder))
    cases = {
        "cut.safetensors": (file.read_bytes()[:-1000], "cut short"),
        "text.safetensors": (b"no safetensors", "cut short"),
        "empty.safetensors": (b"", "cut short"),
        "model.ckpt": (b"\x80\x04K\x01.", "pickle"),
        "model.PT": (b"", "pickle"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SepMEError, match=message):
            loading.load_pipeline(str(tmp_path / name), options)
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("output_blocks.11.1.proj_out.weight"))
    for change in ({name: torch.zeros(2, 2)}, {name: None}):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, tmp_path / "odd.safetensors")
        with pytest.raises(SepMEError, match="its UNet is not that of"):
            loading.load_pipeline(str(tmp_path / "odd.safetensors"), options)
    with pytest.raises(SepMEError, match="neither"):
        loading.load_pipeline(str(tmp_path / "nowhere"), options)


def test_folders_of_other_kinds_or_with_pickles_are_refused(tmp_path: Path) -> None:
    for index, message in (
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": ["evil", "Pipeline"]}, "only StableDiffusionPipeline"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, "no unet as .safetensors"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
        with pytest.raises(SepMEError, match=message):
            loading.load_pipeline(str(tmp_path), LoadOptions())
    (tmp_path / "unet" / "diffusers.py").write_text("raise SystemExit")
    with pytest.raises(SepMEError, match="Python code"):
        loading.load_pipeline(str(tmp_path), LoadOptions())


def test_the_tokenizer_is_found_or_asked_for(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tokenizers.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tokenizers, "_in_cache", lambda: None)
    monkeypatch.setattr(tokenizers, "util", SimpleNamespace(find_spec=lambda name: None))
    file = models("sd1")[1]
    with pytest.raises(SepMEError, match="--tokenizer DIR"):
        loading.load_pipeline(str(file), LoadOptions())
    with pytest.raises(SepMEError, match="holds no CLIP tokenizer"):
        tokenizers.clip_tokenizer(tmp_path)
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"#version\ns t\nst a\nsta r</w>\n"))
    monkeypatch.setattr(tokenizers, "MERGES", 3)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(tokenizers, "util", SimpleNamespace(find_spec=lambda name: package))
    found = tokenizers.clip_tokenizer(pad_token="!")
    assert found(["star"], padding="max_length", max_length=5).input_ids == [[515, 514, 516, 0, 0]]
    with pytest.raises(SepMEError, match="name the tokenizer"):
        loading.load_pipeline(str(file), LoadOptions())


def test_options_are_checked() -> None:
    for options, message in (({"prediction": "sample"}, "prediction type"), ({"device": "nowhere"}, "device")):
        with pytest.raises(SepMEError, match=message):
            LoadOptions(**options)


def test_the_command_line_takes_a_single_file(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder, file = models("sdxl")
    book, out = tmp_path / "book.json", tmp_path / "deltas"
    book.write_text(BOOK.dumps())
    monkeypatch.setattr("sepme.plan.gate.ordinary_prompts", lambda: ("a cat", "a dog", "a house", "a road"))

    def run(*arguments: str) -> Any:
        monkeypatch.setattr("sys.argv", ["sepme", *arguments, "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, json.loads(capsys.readouterr().out or "null")

    where = ("--tokenizer", str(folder))
    code, made = run(
        "train", str(file), str(book), "-o", str(out), "--objective", "closed-form", "--tolerance", "0.02", "--size", "64", *where
    )
    assert code == 0
    paths = [d["file"] for d in made["deltas"]]
    code, checked = run("verify", str(file), *paths, *where)
    assert [d["pooled"]["mode"] for d in checked["deltas"]] == ["replaced"] * 2
    code, shown = run("inspect", *paths)
    assert code == 0
    assert shown[0]["pooled"]["mode"] == "replaced"
    picture = tmp_path / "star.png"
    code, _ = run("generate", str(file), "star", "-o", str(picture), "--delta", paths[0], "--steps", "2", "--size", "64", *where)
    assert code == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run("generate", str(file), "star", "-o", str(picture), "--dtype", "int8")[0] == 2
    assert ldm.Checkpoint.open(file).kind == "sdxl"
