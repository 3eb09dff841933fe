"""The emoji world's pictures: found in every set, mirrored where an alias says so, placed on a background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from demo.emoji_packages import write_packages

from sepme.demo.emoji import data
from sepme.demo.emoji.data import IconSet, Placement, place, random_placement
from sepme.demo.emoji.things import STUDIOS, THINGS, name_of

HALF = '<rect x="0" y="0" width="8" height="16" fill="rgb(255,0,0)"/>'  # the left half of a square of 16


def test_names_of_things_and_studios_are_all_different() -> None:
    assert len({name_of(t) for t in THINGS}) == len(THINGS) >= 224
    assert len({s.word for s in STUDIOS}) == len(STUDIOS) == 9
    assert not {s.word for s in STUDIOS} & {w for t in THINGS for w in name_of(t).split()}


def test_a_slug_is_found_through_aliases_hyphens_and_own_names() -> None:
    icons = {"redapple": {"body": HALF}, "present": {"body": HALF}}
    fx = IconSet({"icons": icons, "width": 16, "height": 16}, "fxemoji")
    assert fx.slug("red-apple") == "redapple"
    assert fx.slug("wrapped-gift") == "present"
    assert fx.slug("church") is None
    with pytest.raises(KeyError, match="fxemoji has no 'church'"):
        fx.svg("church")


def test_an_alias_mirrors_what_it_points_to() -> None:
    pytest.importorskip("resvg_py")
    aliases = {"right": {"parent": "left", "hFlip": True}, "again": {"parent": "right", "hFlip": True}}
    icons = IconSet({"icons": {"left": {"body": HALF}}, "aliases": aliases, "width": 16, "height": 16}, "noto")
    assert [icons.svg(name)[1] for name in ("left", "right", "again")] == [False, True, False]
    picture = data.render(icons.svg("right")[0], 32)
    assert picture[16, 4].tolist() == [255, 0, 0, 255]
    assert picture[16, 28, 3] == 0


def test_an_icon_that_is_not_square_stands_in_the_middle() -> None:
    pytest.importorskip("resvg_py")
    wide = {"body": '<rect x="0" y="0" width="32" height="16" fill="rgb(0,0,255)"/>', "width": 32}
    picture = data.render(IconSet({"icons": {"bus": wide}, "width": 16, "height": 16}, "noto").svg("bus")[0], 32)
    assert picture[:, 16, 3].nonzero()[0].tolist() == list(range(8, 24))


def test_place_mixes_edges_shifts_and_mirrors() -> None:
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[:, :8] = (255, 0, 0, 255)
    picture[:, 8:] = (255, 0, 0, 128)
    placed = place(picture, "blue", Placement(scale=0.5), size=16)
    blue = torch.tensor(data.BACKGROUNDS["blue"])
    assert torch.equal(placed[:, 0, 0], blue.byte())
    assert placed[:, 8, 5].tolist() == [255, 0, 0]
    half = 128 / 255 * torch.tensor([255.0, 0, 0]) + 127 / 255 * blue
    assert torch.allclose(placed[:, 8, 10].float(), half, atol=1.5)
    mirrored = place(picture, "blue", Placement(scale=0.5, mirrored=True), size=16)
    assert torch.equal(mirrored, placed.flip(2))
    shifted = place(picture, "blue", Placement(x=0.25, y=-0.125, scale=0.5), size=16)
    assert torch.equal(shifted, placed.roll((4, -2), (2, 1)))


def test_placements_stay_inside_and_repeat() -> None:
    draws = [[random_placement(torch.Generator().manual_seed(s)) for s in range(200)] for _ in range(2)]
    assert draws[0] == draws[1]
    for p in draws[0]:
        assert abs(p.x) + p.scale / 2 <= 0.52
        assert abs(p.y) + p.scale / 2 <= 0.52
    assert 60 < sum(p.mirrored for p in draws[0]) < 140
    assert not any(random_placement(torch.Generator().manual_seed(s), mirrored=False).mirrored for s in range(50))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"iconify-json-noto-1\.2\.9\.tgz.*cldr-annotations-full-48\.2\.0\.tgz"):
        data.download(tmp_path / "npm")


def test_a_folder_that_somebody_filled_needs_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    write_packages(tmp_path / "npm")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(data, "MASTER", 8)
    pictures = data.render_all(tmp_path / "npm", tmp_path / "renders.npy")
    assert pictures.shape == (len(THINGS), 9, 8, 8, 4)
    assert (pictures[..., 3].reshape(len(THINGS) * 9, -1).max(1) == 255).all()
    assert not (tmp_path / "renders.part").exists()
    assert data.load_emoji(tmp_path / "npm")["red-apple"] == chr(0x1F300 + THINGS.index("red-apple"))
