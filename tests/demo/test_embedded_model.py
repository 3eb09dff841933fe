"""The embedded model is good enough to measure erasures on: sizes, classifier, and what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from sepme.demo.emoji.things import STUDIOS
from sepme.demo.run import classifier_accuracy, demo_suite
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.sampler import Sampler
from sepme.hosts.diffusers import DEMO, DiffusersHost


def test_size_and_licence_of_the_folder() -> None:
    files = [p for p in DEMO.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24e6
    assert not [p for p in files if p.suffix not in (".safetensors", ".json", ".txt") and p.name != "NOTICE"]
    notice = (DEMO / "NOTICE").read_text(encoding="utf-8")
    assert all(studio.author in notice and studio.licence in notice for studio in STUDIOS)


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
    for name in demo_suite().names:
        assert len(demo_host.pipe.tokenizer(name).input_ids) == 2 + len(name.split()), name


def test_classifier_reads_drawings() -> None:
    """As measured when it was trained, on placements that training never saw."""
    accuracy = classifier_accuracy()
    assert accuracy["object"] >= 0.95
    assert accuracy["style"] >= 0.95


def test_model_draws_what_it_is_asked(demo_host: DiffusersHost) -> None:
    """DDIM, 12 steps: things are read correctly, and studios beside things that are named."""
    suite = replace(demo_suite(images=9), steps=12)
    sampler = Sampler(demo_host, EmbeddedClassifier(), suite, lambda: None)
    things = suite.concepts["object"]
    assert fmean(sampler.stock(sampler.sets.own(name)).accuracy for name in things) >= 0.9
    assert fmean(sampler.stock(sampler.sets.both(name)).accuracy for name in things) >= 0.6
