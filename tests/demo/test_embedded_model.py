"""The embedded model is good enough to measure erasures on: sizes, classifier, and what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from sepme.demo.run import demo_suite
from sepme.demo.world import OBJECTS, SMALL, STYLES, classifier_accuracy
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.network import Network
from sepme.evaluate.sampler import Sampler
from sepme.hosts.diffusers import DEMO, DiffusersHost


def test_size_and_licence_of_the_folder() -> None:
    files = [p for p in DEMO.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 16e6
    assert not [p for p in files if p.suffix not in (".safetensors", ".json", ".txt")]


def test_structure_fits_comfyui(demo_host: DiffusersHost) -> None:
    """What ComfyUI's UNet and TAESD can host (norm groups, channel multiples, one number of heads, betas)."""
    unet, vae, scheduler = demo_host.unet.config, demo_host.pipe.vae.config, demo_host.scheduler.config
    first = unet.block_out_channels[0]
    assert unet.norm_num_groups == 32
    assert all(c % first == 0 and c % 32 == 0 for c in unet.block_out_channels)
    assert isinstance(unet.attention_head_dim, int)
    assert isinstance(unet.layers_per_block, int)
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert scheduler.prediction_type == "epsilon"
    assert vae.latent_channels == 4
    assert vae.scaling_factor == 1.0
    assert demo_host.pipe.tokenizer.model_max_length == 77


def test_tokenizer_is_clip_format(demo_host: DiffusersHost) -> None:
    assert {"vocab.json", "merges.txt"} <= {p.name for p in (Path(DEMO) / "tokenizer").iterdir()}
    for word in (*OBJECTS, *STYLES):
        assert len(demo_host.pipe.tokenizer(word).input_ids) == 3, word


def test_classifier_reads_drawings() -> None:
    accuracy = classifier_accuracy(Network.load(DEMO), SMALL)
    assert accuracy["object"] >= 0.97
    assert accuracy["style"] >= 0.97


def test_model_draws_what_it_is_asked(demo_host: DiffusersHost) -> None:
    """DDIM, 25 steps: at least 90 % of objects and of styles are read correctly."""
    sampler = Sampler(demo_host, EmbeddedClassifier(), replace(demo_suite(images=10), steps=25), lambda: None)
    for names in (OBJECTS, STYLES):
        assert fmean(sampler.stock(sampler.sets.own(name)).accuracy for name in names) >= 0.9, names
