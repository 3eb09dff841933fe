"""T5 and language models without a denoiser: what is read of a file or a folder, and the sentence where something is missing."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tiny import diffusers_models, pipelines
from tiny.probe import seeded
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel
from typer.testing import CliRunner

from sepme.apply.composition import Composition
from sepme.cli import app
from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.hosts.diffusers import DEMO
from sepme.hosts.encoders import load_encoders
from sepme.hosts.loading import LoadOptions
from sepme.model.encoder_fingerprint import SAME, EncoderFingerprint
from sepme.plan import encoded_book
from sepme.plan.gate import ordinary_prompts

CLOSED = ["--objective", "closed-form", "--edit", "context"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of Flux.1's text encoders and tokenizers in diffusers' layout, tiny; T5 in two files."""
    folder = tmp_path_factory.mktemp("flux")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).symlink_to(DEMO / part)
    vocabulary = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(ordinary_prompts()), model_writer=vocabulary, vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_2").mkdir()
    (folder / "tokenizer_2" / "spiece.model").write_bytes(vocabulary.getvalue())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 320, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
        T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder / "text_encoder_2", max_shard_size="80KB")
    assert len(list((folder / "text_encoder_2").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.json"
    path.write_text(ConceptBook((Concept("cat", ("cat", "a photo of a cat")),), ("a red house",)).dumps(), encoding="utf-8")
    return path


def refused(*command: Any) -> str:
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert isinstance(result.exception, SepMEError), result.output
    return str(result.exception)


def single_file(folder: Path, path: Path, **change: torch.Tensor) -> Path:
    """The folder's T5 as one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in (folder / "text_encoder_2").glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors | change, path)
    return path


def test_a_file_trains_and_verifies(flux: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delta erases what its encoder reads and nothing else; the second command reads the ordinary prompts from disk."""
    monkeypatch.setenv("SEPME_CACHE", str(tmp_path / "cache"))
    file = single_file(flux, tmp_path / "t5xxl_fp16.safetensors")
    own = [file, "--family", "pixart", "--tokenizer", flux / "tokenizer_2"]
    trained = CliRunner().invoke(app, ["train", *map(str, own[:1]), str(book), *map(str, own[1:]), "-o", str(tmp_path), *CLOSED])
    assert trained.exit_code == 0, trained.output
    delta = ConceptDelta.load(tmp_path / "cat.safetensors")
    encoder = load_encoders(str(file), LoadOptions(tokenizer=str(flux / "tokenizer_2")), "pixart")
    assert delta.facts.text_encoder is not None
    assert delta.facts.text_encoder.name == "T5-XXL"
    assert delta.facts.text_encoder.distance(EncoderFingerprint.of(encoder)) < SAME
    context = encoder.encode(["a photo of a cat", "a red house"]).context
    edited = Composition((delta,)).edit_context(context, torch.ones(2, 1))
    assert not torch.equal(edited[0], context[0])
    assert torch.equal(edited[1], context[1])
    stored = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache" / "encodings").iterdir()}
    assert len(stored) == 40  # 640 prompts, 16 each
    checked = CliRunner().invoke(app, ["verify", str(file), str(tmp_path / "cat.safetensors"), *map(str, own[1:]), "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["deltas"][0]["holds"] is True
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache" / "encodings").iterdir()} == stored


def test_a_folder_says_whose_it_is(flux: Path, tmp_path: Path) -> None:
    """By its denoiser; Flux.1's pooled vector is that of the CLIP beside T5. The same from one file, but without CLIP."""
    for part in flux.iterdir():
        (tmp_path / part.name).symlink_to(part)
    diffusers_models.build("flux1").model.save_pretrained(tmp_path / "transformer")
    found = load_encoders(str(tmp_path), LoadOptions()).encode(["a cat", "a red house by the sea"])
    assert found.context.shape == (2, 256, 64)
    assert bool(found.mask.all())  # Flux.1 reads what fills a prompt up
    assert found.pooled is not None
    file = single_file(flux, tmp_path / "t5.safetensors")
    alone = load_encoders(str(file), LoadOptions(tokenizer=str(flux / "tokenizer_2")), "flux1").encode(["a cat", "a red house by the sea"])
    assert torch.equal(alone.context, found.context)
    assert alone.pooled is None
    short = load_encoders(str(file), LoadOptions(tokenizer=str(flux / "tokenizer_2")), "ltxv").encode(["a cat"])
    assert short.context.shape == (1, 128, 64)
    assert 0 < int(short.mask.sum()) < 10
    assert not short.context[0, int(short.mask.sum()) :].any()  # LTX-Video does not


def test_a_pipeline_is_trained_through(flux: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is read as published, but for the text encoders' place in its class; what it cannot be used for is said."""
    monkeypatch.setattr(encoded_book, "affordable", lambda context: ordinary_prompts()[:24])
    folder, out = tmp_path / "flux", tmp_path / "out"
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    width = json.loads((DEMO / "text_encoder" / "config.json").read_text())["hidden_size"]
    transformer = FluxTransformer2DModel(in_channels=16, joint_attention_dim=64, pooled_projection_dim=width, **sizes)
    pipelines.build("flux1", seeded(transformer)).save_pretrained(folder)
    for part in flux.iterdir():
        (folder / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    train = ("train", folder, book, "-o", out, "--nearby", 0, "--size", 64)
    trained = CliRunner().invoke(app, [*map(str, train), "--edit", "context", "--steps", "6", "--batch", "2", "--objective", "esd"])
    assert trained.exit_code == 0, trained.output
    delta = ConceptDelta.load(out / "cat.safetensors")
    assert delta.facts.losses[-1] < delta.facts.losses[0]
    assert delta.facts.text_encoder is not None
    assert delta.facts.text_encoder.name == "T5-XXL"
    assert delta.pooled is not None
    assert delta.certificate.worst_leakage < 0.01
    context = load_encoders(str(folder), LoadOptions()).encode(["a photo of a cat", "a red house"]).context
    edited = Composition((delta,)).edit_context(context, torch.ones(2, 1))
    assert not torch.equal(edited[0], context[0])
    assert torch.equal(edited[1], context[1])
    (tmp_path / "pictures").mkdir()
    for options, said in (
        ((), "choose the edit context"),
        (("--edit", "context", "--objective", "fmn"), "objective fmn is for Stable Diffusion"),
        (("--edit", "context", "--images", tmp_path / "pictures"), "leave out --images"),
        (("--edit", "context", "--guard", "--nearby", 5), "holds text encoders and no model"),
    ):
        assert said in refused(*train, *options)
    assert "holds text encoders and no model" in refused("generate", folder, "a cat", "-o", tmp_path / "x.png")


def test_what_is_missing_is_said(flux: Path, book: Path, tmp_path: Path) -> None:
    """Whose prompts, no tokenizer, another's tokenizer, quantised, cut short, another family's denoiser, and what needs a model."""
    file = single_file(flux, tmp_path / "t5.safetensors")
    train = ("train", file, book, "-o", tmp_path / "out", *CLOSED)
    assert "several families read" in (said := refused(*train))
    assert all(name in said for name in ("chroma", "flux1", "ltxv", "pixart"))
    assert "No family 'sd3' reads" in refused(*train, "--family", "sd3")
    assert "holds no tokenizer" in refused(*train, "--family", "flux1")
    words = ("--tokenizer", flux / "tokenizer_2")
    large = single_file(flux, tmp_path / "small.safetensors", **{"shared.weight": torch.zeros(5, 64)})
    assert "tokens that" in refused("train", large, book, "-o", tmp_path, *CLOSED, "--family", "flux1", *words)
    low = single_file(flux, tmp_path / "low.safetensors", **{"shared.weight": torch.zeros(320, 64).to(torch.float8_e4m3fn)})
    assert "is quantised" in refused("train", low, book, "-o", tmp_path, *CLOSED, "--family", "flux1", *words)
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    assert "lacks encoder.block.1" in refused(
        "train", tmp_path / "part.safetensors", book, "-o", tmp_path, *CLOSED, "--family", "flux1", *words
    )
    (tmp_path / "t5.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refused("train", tmp_path / "t5.gguf", book, "-o", tmp_path, *CLOSED)
    assert "holds text encoders and no model" in refused("train", file, book, "-o", tmp_path)
    assert "holds text encoders and no model" in refused("generate", file, "a cat", "-o", tmp_path / "x.png")
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "clip" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "clip" / part).symlink_to(DEMO / part)
    assert "holds no text encoder but CLIP" in refused("train", tmp_path / "clip", book, "-o", tmp_path, *CLOSED, "--family", "flux1")
    for part in flux.iterdir():
        (tmp_path / part.name).symlink_to(part)
    diffusers_models.build("sd3").model.save_pretrained(tmp_path / "transformer")
    assert "SD3.x reads its text in a way that is only known in ComfyUI" in refused(
        "train", tmp_path, book, "-o", tmp_path / "out", *CLOSED
    )


def test_a_language_model_by_its_config(flux: Path, tmp_path: Path) -> None:
    """Where a config.json stands beside the weights its rotary base counts, in either form of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}
        model = Qwen3Model(Qwen3Config(vocab_size=320, head_dim=32, **sizes, **rope)).eval()
    model.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes((tmp_path / "new" / "model.safetensors").read_bytes())
    old = {"text_config": {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_theta": 1234.0}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    encoders = [load_encoders(str(tmp_path / n), LoadOptions(tokenizer=str(flux / "tokenizer_2")), "z-image") for n in ("new", "old")]
    found = [e.encode(["a cat"]) for e in encoders]
    assert torch.equal(found[0].context, found[1].context)
    ids = encoders[0]._tokenizer("<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n")  # type: ignore[union-attr]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found[0].context, expected, rtol=1e-5, atol=1e-5)
