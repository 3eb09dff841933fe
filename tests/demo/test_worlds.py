"""The drawing worlds: what they hold, that captions and pictures agree, and that a model of the larger one can be made."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sepme.demo.large import FAMILIES, LARGE
from sepme.demo.train import RECIPES, WorldRecipe, build_tokenizer, train_classifier, train_diffusion, train_export, train_vae
from sepme.demo.world import SMALL, Drawing, World
from sepme.evaluate.network import Network
from sepme.hosts.diffusers import DiffusersHost


def test_larger_world_has_48_concepts() -> None:
    words = [w for names in FAMILIES.values() for w in names]
    assert len(words) == len(set(words)) == 48
    assert set(words) == set(LARGE.words)
    assert LARGE.heads == (16, 25, 8)


def test_words_are_single_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, RECIPES["large"])
    assert {len(tokenizer(w).input_ids) for w in LARGE.words} == {3}


@pytest.mark.parametrize("world", [SMALL, LARGE], ids=["small", "large"])
def test_captions_describe_their_scenes(world: World) -> None:
    """Every word of the world that a caption holds is in its scene, and what it does not name is plain unless it is empty."""
    generator = torch.Generator().manual_seed(1)
    named = set()
    for _ in range(2000):
        caption, scene = world.random_caption(generator)
        words = {w for w in re.findall(r"\w+", caption) if w in world.words}
        named |= words
        assert all(scene[head] == label for head, label in map(world.place_of, words)), caption
        if caption and not words & set(world.styles):
            assert scene.style == len(world.styles), caption
    assert named == set(world.words)


def test_embedded_models_captions_are_those_it_was_trained_on() -> None:
    generator = torch.Generator().manual_seed(5)
    sampled = [(c, *s) for c, s in (SMALL.random_caption(generator) for _ in range(1000))]
    assert hashlib.sha256(repr(sampled).encode()).hexdigest()[:16] == "d1b8ba1a1033fc59"


def test_every_concept_shows() -> None:
    """Drawn at the same place, pictures of any two concepts of one head (or of a style and none) differ in 2 % of their pixels."""
    for head, size in enumerate(LARGE.heads):
        scenes = [Drawing(*(i if h == head else 0 if h != 1 else 24 for h in range(3))) for i in range(size)]
        images = torch.stack([LARGE.draw(s, torch.Generator().manual_seed(3)) for s in scenes])
        assert images.min() >= 0
        assert images.max() <= 1
        differ = ((images[:, None] - images[None]).abs().amax(dim=2) > 0.1).float().mean((2, 3)) + torch.eye(size)
        assert differ.min() >= 0.02, head


@pytest.fixture(scope="module")
def tiny() -> WorldRecipe:
    """The larger recipe, a few steps long, over a part of the larger world."""
    world = replace(LARGE, objects=LARGE.objects[:3], styles=LARGE.styles[:3], colours=dict(list(LARGE.colours.items())[:2]))
    return replace(
        RECIPES["large"], world=world, scenes=24, vae_width=8, vae_steps=2, classifier_steps=2, diffusion_steps=2, batch=4, each=1
    )


def test_trains_goes_on_and_exports(tiny: WorldRecipe, tmp_path: Path) -> None:
    train_vae(tmp_path, tiny)
    train_classifier(tmp_path, tiny)
    train_diffusion(tmp_path, replace(tiny, diffusion_steps=1))
    train_diffusion(tmp_path, tiny)
    assert torch.load(tmp_path / "diffusion.pt", weights_only=True)["step"] == 2
    train_export(tmp_path, tiny)
    host = DiffusersHost.load(str(tmp_path / "model"))
    classifier = Network.load(tmp_path / "model")
    assert classifier.labels == tiny.world.labels
    images = host.generate(["a star", "a striped circle"], [1, 2], steps=2)
    assert classifier.predict(images).shape == (2, 3)
    assert len(host.pipe.tokenizer("hourglass").input_ids) > 3  # the part of the world does not know it
    assert len(host.pipe.tokenizer("banded").input_ids) == 3
