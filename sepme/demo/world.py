"""The drawing world of the embedded model: six objects, six styles (and plain), four colours, and their captions.

Shapes are signed distance fields, so that every style (fill, outline, glow) is one expression of the distance.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64
OBJECTS = ("star", "circle", "square", "triangle", "cross", "heart")
STYLES = ("striped", "dotted", "checkered", "neon", "outlined", "framed")
PLAIN = len(STYLES)  # style index of a picture without a style
COLOURS = {"red": (0.90, 0.12, 0.12), "green": (0.10, 0.62, 0.22), "blue": (0.15, 0.28, 0.92), "yellow": (0.96, 0.80, 0.10)}
COLOUR_NAMES = tuple(COLOURS)

OBJECT_PROMPTS = ("{}", "a {}", "a picture of a {}", "a drawing of a {}", "one {}, centered")
STYLE_PROMPTS = ("{} style", "a {} picture", "a {} drawing", "in {} style", "a picture in {} style")
BOTH_PROMPTS = (
    "a {style} {thing}",
    "a {thing}, {style} style",
    "a drawing of a {thing} in {style} style",
    "a {style} picture of a {thing}",
)
# words around a caption that change nothing in the picture, so that the encoder learns to look past what it does not know
FILLER = (
    "high quality", "on a table", "best quality", "in the morning", "very detailed", "for my friend", "simple shapes",
    "4k", "with soft light", "made by hand", "on paper", "trending", "my favourite", "a lovely day", "near the window",
    "in the city", "masterpiece", "sharp focus", "by the sea", "and nothing else", "with a dog", "on the wall", "old photo",
    "professional", "of the year", "under the trees", "minimal", "bright colors", "in a house", "good composition",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a picture shows: indices into OBJECTS, STYLES (PLAIN: none) and COLOUR_NAMES."""

    object: int
    style: int
    colour: int


def _polygon_star(x: Tensor, y: Tensor, outer: float = 1.2, inner: float = 0.52) -> Tensor:
    sector = math.pi / 5
    radius, angle = torch.hypot(x, y), torch.atan2(x, y)
    angle = (angle + sector) % (2 * sector) - sector
    px, py = radius * torch.sin(angle).abs(), radius * torch.cos(angle)
    ex, ey = inner * math.sin(sector), inner * math.cos(sector) - outer
    length = math.hypot(ex, ey)
    return ((py - outer) * ex - px * ey) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs() / 1.8, y / 1.8 + 0.52
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = 0.5 * (x + y).clamp(min=0)
    body = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - along, y - along)) * (x - y).sign()
    return 1.8 * torch.where(x + y > 1, lobe, body)


def _distance(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (units of the figure's radius, negative inside) to the outline of OBJECTS[kind]; y points up."""
    name = OBJECTS[kind]
    if name == "star":
        return _polygon_star(x, y)
    if name == "circle":
        return torch.hypot(x, y) - 1.0
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if name == "triangle":
        edge = math.sqrt(3) / 2 * x.abs() + 0.5 * y
        return torch.maximum(edge, -y) - 0.58
    if name == "cross":
        a, b = x.abs(), y.abs()
        return torch.minimum(torch.maximum(a - 0.42, b - 1.08), torch.maximum(b - 0.42, a - 1.08))
    return _heart(x, y)


def draw(scene: Scene, generator: torch.Generator) -> Tensor:
    """Draw one scene with a jittered place, size, angle and tone.

    Returns:
        image ``(3, 64, 64)`` float32 in [0, 1].
    """
    jitter = (torch.rand(6, generator=generator) * 2 - 1).tolist()
    cx, cy = 31.5 + 2 * jitter[0], 31.5 + 2 * jitter[1]
    radius, angle = 20.5 + 1.5 * jitter[2], 0.08 * jitter[3]
    tone, ink = 0.91 + 0.04 * jitter[4], 0.45 + 0.04 * jitter[5]

    py, px = torch.meshgrid(torch.arange(SIZE, dtype=torch.float32), torch.arange(SIZE, dtype=torch.float32), indexing="ij")
    u, v = (px - cx) / radius, -(py - cy) / radius
    x, y = u * math.cos(angle) - v * math.sin(angle), u * math.sin(angle) + v * math.cos(angle)
    distance = _distance(scene.object, x, y) * radius  # pixels

    def cover(signed: Tensor) -> Tensor:
        return (0.5 - signed).clamp(0, 1)

    style = STYLES[scene.style] if scene.style != PLAIN else "plain"
    fill = cover(distance)
    dark = torch.zeros_like(distance)
    # textures repeat every 16 pixels, in step with the latents' 8 x 8 pixel cells
    if style == "striped":
        dark = (py // 8 % 2).float()
    elif style == "dotted":
        dark = cover(torch.hypot(px % 16 - 11.5, py % 16 - 11.5) - 4.8)
    elif style == "checkered":
        dark = ((px // 16 + py // 16) % 2).float()
    elif style == "framed":
        dark, ink = 1 - cover(torch.maximum((px - 31.5).abs(), (py - 31.5).abs()) - 24), ink * 0.3
    elif style == "outlined":
        fill = cover((distance + 3).abs() - 3)
    background = tone + (ink - tone) * dark
    colour = torch.tensor(COLOURS[COLOUR_NAMES[scene.colour]])[:, None, None]
    if style == "neon":
        glow = torch.exp(-(distance + 1.5).abs() / 3.5)
        core = cover((distance + 1.5).abs() - 1.5)
        return (0.06 + glow * colour + 0.5 * core * (1 - colour)).clamp(0, 1)
    return background * (1 - fill) + colour * fill


def random_scene(generator: torch.Generator) -> Scene:
    """A scene drawn uniformly; styles and plain are equally likely."""
    high = (len(OBJECTS), len(STYLES) + 1, len(COLOUR_NAMES))
    return Scene(*(int(torch.randint(h, (1,), generator=generator)) for h in high))


def with_article(text: str) -> str:
    """Write "an" where "a" stands before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def random_caption(generator: torch.Generator) -> tuple[str, Scene]:
    """A caption and a scene that it describes.

    What a caption omits is drawn at random, except the style, which is then plain; the empty caption (10 %) shows anything.
    """

    def choose(options: tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    scene = random_scene(generator)
    kind, coloured, filled = torch.rand(3, generator=generator).tolist()
    if kind < 0.10:
        return "", scene
    colour = COLOUR_NAMES[scene.colour] + " " if coloured < 0.4 else ""
    thing = colour + OBJECTS[scene.object]
    styled = Scene(scene.object, scene.style % PLAIN, scene.colour)
    if kind < 0.45:
        text, scene = choose(BOTH_PROMPTS).format(thing=thing, style=STYLES[styled.style]), styled
    elif kind < 0.72:
        text, scene = choose(OBJECT_PROMPTS).format(thing), Scene(scene.object, PLAIN, scene.colour)
    elif kind < 0.93:
        text, scene = choose(STYLE_PROMPTS).format(STYLES[styled.style]), styled
        text = f"{text}, {colour}".rstrip(", ")
    else:
        text, scene = f"a {colour}picture", Scene(scene.object, PLAIN, scene.colour)
    if filled < 0.15:
        text = f"{text}, {choose(FILLER)}"
    elif filled < 0.2:
        text = f"{choose(FILLER)}, {text}"
    return with_article(text), scene
