"""Tiny stand-ins for the npm packages of the emoji world: every thing by every studio, as a plain figure."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from sepme.demo.emoji.data import CLDR, tarball
from sepme.demo.emoji.things import OWN_SLUGS, STUDIOS, THINGS


def write_package(path: Path, files: dict[str, object]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def figure(thing: int, studio: int) -> str:
    colour = f"rgb({(thing * 53) % 256},{(thing * 97) % 256},{studio * 28})"
    bar = f'<rect x="1" y="{thing % 12}" width="5" height="3" fill="black"/>'
    return f'<circle cx="{8 + thing % 3}" cy="8" r="{4 + studio % 3}" fill="{colour}"/>{bar}'


def write_packages(folder: Path) -> None:
    """What ``npm pack`` would leave in ``folder``; slugs are the sets' own, one set's have no hyphens."""
    folder.mkdir(parents=True, exist_ok=True)
    for s, studio in enumerate(STUDIOS):
        icons = {}
        for t, thing in enumerate(THINGS):
            own = OWN_SLUGS.get(studio.package, {}).get(thing) or OWN_SLUGS["*"].get(thing) or thing
            icons[own.replace("-", "") if studio.package == "fxemoji" else own] = {"body": figure(t, s)}
        characters = {f"{0x1F300 + i:x}": OWN_SLUGS["*"].get(thing, thing) for i, thing in enumerate(THINGS)}
        content = {"prefix": studio.package, "icons": icons, "aliases": {}, "width": 16, "height": 16}
        path = tarball(folder, f"@iconify-json/{studio.package}", studio.version)
        write_package(path, {"icons.json": content, "chars.json": characters})
    keywords = {
        chr(0x1F300 + i): {
            "tts": [thing.replace("-", " ")],
            "default": [f"only{'abcdefghij'[i % 10] * 2}{'klmnopqrstuvwxyz'[i // 10 % 16]}", "everything"],
        }
        for i, thing in enumerate(THINGS[:40])
    }
    write_package(tarball(folder, *CLDR), {"annotations/en/annotations.json": {"annotations": {"annotations": keywords}}})
