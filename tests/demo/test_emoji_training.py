"""Training of the emoji world: goes on from a checkpoint to the same numbers, learns, and exports what diffusers loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Lumina2Transformer2DModel, StableDiffusionPipeline
from torch import Tensor, nn

from sepme.demo.emoji import diffusion
from sepme.demo.emoji.captions import words_of
from sepme.demo.emoji.classifiers import held_out, train_classifier
from sepme.demo.emoji.data import BACKGROUND_NAMES, place
from sepme.demo.emoji.diffusion import Batches, Context, Latents, build_unet, train_diffusion
from sepme.demo.emoji.export import export, export_flow
from sepme.demo.emoji.flow import build_flow, encode, sample, train_flow, velocity
from sepme.demo.emoji.pictures import read, read_accuracy, unet_painter
from sepme.demo.emoji.stage import Stage, load_stage
from sepme.demo.emoji.text import WIDTH, build_text_encoder, build_tokenizer, load_tokenizer, train_text
from sepme.demo.emoji.things import STUDIOS, STYLES, THINGS
from sepme.demo.emoji.vae import begin_with_averages, build_vae, to_model, train_vae
from sepme.evaluate.network import Network


@pytest.fixture(scope="module")
def renders() -> np.ndarray:
    """Every thing by every studio as a disc of its own colour."""
    generator = np.random.default_rng(0)
    pictures = np.zeros((len(THINGS), len(STUDIOS), 16, 16, 4), np.uint8)
    y, x = np.mgrid[:16, :16] - 7.5
    pictures[:, :, x * x + y * y < 40, :3] = generator.integers(0, 256, (len(THINGS), len(STUDIOS), 1, 3))
    pictures[:, :, x * x + y * y < 40, 3] = 255
    return pictures


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, renders: np.ndarray) -> Path:
    """A folder in which every stage has taken a step or two, on one thing."""
    folder = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "ON_WHITE", 2)
        patch.setattr(diffusion, "ON_COLOUR", 1)
        patch.setattr(diffusion, "VARIANTS", 10)
        train_vae(folder, renders, steps=1, batch=1)
        words = words_of([[] for _ in THINGS])
        words.save(folder / "words.json")
        tokenizer = build_tokenizer(folder / "tokenizer", words.vocabulary)
        batches = Batches(Latents(folder, renders, 1), words, tokenizer, captions=2, draws=2)
        train_text(folder, words, tokenizer, steps=20, batch=16)
        train_diffusion(folder, batches, steps=4)
        train_flow(folder, batches, steps=2)
        train_classifier(folder, renders[:1], steps=1, batch=2)
        (folder / "classifier.json").write_text(json.dumps(held_out(folder, renders[:1], 20)))
        export(folder, folder / "model")
        patch.setattr(batches, "draws", 1)
        for name in ("once", "twice"):
            other = folder / name
            other.mkdir()
            shutil.copy(folder / "text.pt", other)
            if name == "twice":
                train_diffusion(other, batches, steps=5, until=2)
            train_diffusion(other, batches, steps=5)
    return folder


def test_the_denoiser_goes_on_with_an_encoder_that_knows_its_captions(work: Path) -> None:
    """A few steps tell studios and backgrounds apart better than chance does, and the denoiser starts from there."""
    tokenizer = load_tokenizer(work / "tokenizer")
    text = load_stage(build_text_encoder(tokenizer), work, "text", "text")
    heads = load_stage(nn.ModuleList(nn.Linear(WIDTH, n) for n in (len(THINGS), len(STYLES), len(BACKGROUND_NAMES))), work, "text", "heads")
    ids = tokenizer([f"{s} style" for s in STYLES], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = heads[1](text(ids).pooler_output)
    assert torch.nn.functional.cross_entropy(logits, torch.arange(len(STYLES))) < math.log(len(STYLES))
    started = load_stage(build_text_encoder(tokenizer), work, "diffusion", "text").state_dict()
    assert all((value - started[key]).abs().max() < 0.01 for key, value in text.state_dict().items())


def test_a_resumed_training_ends_in_the_same_numbers(work: Path) -> None:
    once, twice = (torch.load(work / name / "diffusion.pt", weights_only=True) for name in ("once", "twice"))
    assert once["step"] == twice["step"] == 5
    assert torch.equal(once["generator"], twice["generator"])
    for part in ("unet", "text", "unet_average", "text_average"):
        assert all(torch.equal(value, twice[part][key]) for key, value in once[part].items()), part
    for i, state in once["optimizer"]["state"].items():
        assert all(torch.equal(value, twice["optimizer"]["state"][i][key]) for key, value in state.items()), i


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = torch.randn(4)

    def train(steps: int) -> tuple[nn.Linear, list[int]]:
        model, seen = nn.Linear(1, 4, bias=False), []
        stage = Stage(tmp_path, "line", {"line": model}, steps, 0.1, seed=1, every=10)

        def loss_of(step: int) -> Tensor:
            seen.append(step)
            return (model(torch.rand(1, generator=stage.generator)) - target).square().mean()

        stage.run(loss_of)
        return model, seen

    assert train(30)[1] == list(range(30))
    model, seen = train(200)
    assert seen == list(range(30, 200))
    assert float((model(torch.tensor([0.5])) - target).detach().square().mean()) < 0.5 * float(target.square().mean())
    assert train(200)[1] == []


def test_a_killed_save_leaves_the_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, "line", {"line": nn.Linear(1, 1)}, 10, 0.1, seed=1)
    stage.save()
    before = (tmp_path / "line.pt").read_bytes()

    def broken(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        stage.save()
    assert (tmp_path / "line.pt").read_bytes() == before


def test_the_autoencoder_starts_with_mean_colours(renders: np.ndarray) -> None:
    """Before any step it already gives a picture's colours back, patch by patch, with latents of about unit variance."""
    torch.manual_seed(1)
    vae, mean = build_vae(), nn.AvgPool2d(8)
    x = to_model(torch.stack([place(renders[t, 0], ground) for t, ground in enumerate(BACKGROUND_NAMES)]))
    with torch.no_grad():
        before = float((mean(vae.decoder(vae.encoder(x))) - mean(x)).abs().mean())
        begin_with_averages(vae)
        z = vae.encoder(x)
        after = float((mean(vae.decoder(z)) - mean(x)).abs().mean())
    assert after < 0.1 < 0.4 < before  # the decoder squashes black and white a little
    assert 0.4 < float(z[:, :3].std()) < 2


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python -m sepme\.demo\.emoji vae --work"):
        load_stage(build_vae(), tmp_path, "vae", "vae")


def test_latents_differ_between_placements_studios_and_backgrounds(work: Path) -> None:
    made = np.load(work / "latents.npy", mmap_mode="r")
    assert made.shape == (len(THINGS), 9, 10, 4, 16, 16)
    assert Latents.count(work) == 1
    assert np.abs(made[0]).max(axis=(-1, -2, -3)).min() > 0
    assert not made[1:].any()
    flat = made[0].reshape(90, -1)
    assert len(np.unique(flat, axis=0)) == 90


def test_the_last_token_stands_for_the_padding_that_is_left_out(work: Path) -> None:
    """Its raised weight in cross-attention gives what as many copies of it would give."""
    torch.manual_seed(5)
    unet, context = (
        build_unet().eval(),
        Context(build_text_encoder(build_tokenizer(work / "tokenizer", words_of([[] for _ in THINGS]).vocabulary))),
    )
    x, t, states = torch.randn(2, 4, 16, 16), torch.tensor([400, 400]), torch.randn(2, Context.SHORT, 384)
    copies = torch.cat([states, states[:, -1:].expand(-1, 77 - Context.SHORT, -1)], 1)
    with torch.no_grad():
        kinds = (context.around(states), context.around(copies), {"encoder_hidden_states": states})
        short, full, bare = (unet(x, t, **kind).sample for kind in kinds)
    assert torch.allclose(short, full, atol=1e-4)
    assert not torch.allclose(bare, full, atol=1e-2)


def test_the_folder_loads_in_diffusers_and_draws_the_same(work: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(work / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae_scale_factor == 8
    assert pipe.tokenizer.model_max_length == 77
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(500))
    picture = pipe("a church by noto", latents=start, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    ours = unet_painter(work, steps=3, guidance=3.0)(["a church by noto"], 500)
    assert picture.shape == (1, 3, 128, 128)
    assert torch.allclose(picture, (ours / 2 + 0.5).clamp(0, 1), atol=0.02)  # float16 weights


def test_what_the_folder_says(work: Path) -> None:
    folder = work / "model"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 24e6
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    assert [t["slug"] for t in world["things"]] == list(THINGS)
    assert [t["trained"] for t in world["things"]] == [True] + [False] * (len(THINGS) - 1)
    assert world["styles"] == list(STYLES)
    assert set(world["classifier_accuracy"]) == {"object", "style", "colour"}
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    for studio in STUDIOS:
        assert f"@iconify-json/{studio.package} {studio.version}, {studio.licence}" in notice
    assert Network.load(folder).predict(torch.zeros(2, 3, 128, 128)).shape == (2, 3)


def test_the_flow_folder_loads_in_diffusers(work: Path) -> None:
    export_flow(work, work / "flow")
    model = Lumina2Transformer2DModel.from_pretrained(work / "flow", dtype=torch.float32)
    trained = load_stage(build_flow(), work, "flow", "flow_average")
    assert all(torch.allclose(v, trained.state_dict()[k], atol=1e-3) for k, v in model.state_dict().items())
    assert sum(p.stat().st_size for p in (work / "flow").iterdir()) <= 16e6
    export_flow(work / "once", work / "nothing")
    assert not (work / "nothing").exists()


def test_a_flow_of_another_text_encoder_is_not_exported(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "tokenizer", tmp_path / "tokenizer")
    shutil.copy(work / "flow.pt", tmp_path)
    shutil.copy(work / "once" / "diffusion.pt", tmp_path)
    with pytest.raises(SystemExit, match="another text encoder"):
        export_flow(tmp_path, tmp_path / "flow")
    assert not (tmp_path / "flow").exists()


def test_structure_fits_comfyui(work: Path) -> None:
    """Norm groups, channel multiples, one number of heads, as many layers on every level, Stable Diffusion's betas."""
    unet = json.loads((work / "model" / "unet" / "config.json").read_text())
    first = unet["block_out_channels"][0]
    assert unet["norm_num_groups"] == 32
    assert all(c % first == 0 and c % 32 == 0 for c in unet["block_out_channels"])
    assert isinstance(unet["attention_head_dim"], int)
    assert isinstance(unet["layers_per_block"], int)
    scheduler = json.loads((work / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"]) == ("scaled_linear", 0.00085, 0.012)
    assert json.loads((work / "model" / "vae" / "config.json").read_text())["latent_channels"] == 4


def test_reading_counts_what_was_asked(work: Path, renders: np.ndarray) -> None:
    """A painter that paints what it is asked is read right by a classifier that looks at the corner pixel, any other is not."""
    from sepme.demo.emoji.pictures import asked

    pairs = dict(asked(5, 36, 500))
    assert {s.thing for s in pairs.values()} == set(range(5))

    class CornerReader:
        def predict(self, pictures: Tensor) -> Tensor:
            return pictures[:, 0, 0, :3].long()

    def painter(captions: tuple[str, ...], seed: int) -> Tensor:
        pictures = torch.zeros(len(captions), 3, 4, 4)
        pictures[:, 0, 0, :3] = torch.tensor([pairs[c] for c in captions], dtype=torch.float32)
        return pictures

    assert set(read_accuracy(*read(painter, CornerReader(), 5, 36)).values()) == {1.0}  # type: ignore[arg-type]
    blind = read_accuracy(*read(lambda c, s: torch.zeros(len(c), 3, 4, 4), CornerReader(), 5, 36))  # type: ignore[arg-type]
    assert blind["thing"] == round(8 / 36, 4)
    assert blind["style"] < 0.5
    assert {name: share for name, share in blind.items() if name in STYLES} == dict.fromkeys(STYLES, 0.0) | {STYLES[0]: 1.0}
    assert set(held_out(work, renders[:1], count=4)) == {f"{k} {h}" for k in ("plain", "decoded") for h in ("thing", "style", "background")}


def test_flow_ignores_padding_and_walks_to_the_data(work: Path) -> None:
    assert sum(p.numel() for p in build_flow().parameters()) * 2 <= 16e6
    torch.manual_seed(6)
    model = build_flow().eval()
    nn.init.normal_(model.norm_out.linear_2.weight, std=0.1)
    ids = torch.tensor([[7, 1, 2, 9, 9, 9], [7, 3, 9, 9, 9, 9]])
    text = build_text_encoder(load_tokenizer(work / "tokenizer")).eval()
    context, mask = encode(text, ids, end=9)
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] * 3 + [False] * 3]
    x, sigma = torch.randn(2, 4, 16, 16), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        flow = velocity(model, x, sigma, context, mask)
        other = velocity(model, x, sigma, torch.where(mask[..., None], context, 3.0), mask)
        assert torch.allclose(flow, other, atol=1e-5)
        assert not torch.allclose(flow, velocity(model, x, sigma, context.flip(0), mask.flip(0)), atol=1e-3)

    class Straight(nn.Module):
        """Knows one picture, all ones: the flow to noise is (x - picture) / sigma."""

        def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (-(x - 1) / (1 - time)[:, None, None, None],)

    sampled = sample(Straight(), x, context, mask, context, mask, steps=4, guidance=1.0)  # type: ignore[arg-type]
    assert torch.allclose(sampled, torch.ones_like(x), atol=1e-5)
    assert math.isfinite(float(sampled.sum()))
