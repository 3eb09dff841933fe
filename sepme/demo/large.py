"""The larger drawing world: 48 concepts in five families. Fills, textures and places share the place of a picture's style."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .shapes import SHAPES
from .strokes import Canvas, cover, texture
from .world import COLOURS, SIZE, Shares, World

FILLS = ("outlined", "banded", "spotted", "halved", "shaded", "bordered", "shadowed", "glowing")
TEXTURES = ("striped", "columned", "checkered", "dotted", "framed", "slanted", "ringed", "latticed")
PLACES = ("sea", "desert", "night", "forest", "city", "meadow", "sunset", "room")
EIGHT_COLOURS = COLOURS | {"orange": (1.0, 0.5, 0.05), "purple": (0.5, 0.15, 0.7), "pink": (1.0, 0.5, 0.75), "teal": (0.1, 0.7, 0.75)}
FAMILIES = {"shape": tuple(SHAPES), "fill": FILLS, "colour": tuple(EIGHT_COLOURS), "texture": TEXTURES, "place": PLACES}
COLOUR_PROMPTS = ("{}", "a {} picture", "a {} drawing", "a picture, {}", "a drawing, {}")


def _over(bottom: Tensor, colour: tuple[float, float, float], where: Tensor) -> Tensor:
    """A colour laid over a picture ``(3, 64, 64)`` where ``(64, 64)`` says."""
    return bottom + (_colour(*colour) - bottom) * where


def _colour(r: float, g: float, b: float) -> Tensor:
    return torch.tensor([r, g, b])[:, None, None]


def _place(name: str, x: Tensor, y: Tensor) -> Tensor:
    """A place ``(3, 64, 64)`` in pale or dark colours; figures have strong ones. x, y: pixels."""

    def paper(r: float, g: float, b: float) -> Tensor:
        return _colour(r, g, b).expand(3, SIZE, SIZE)

    if name == "sea":
        waves = cover(38 + 3 * torch.sin(x * (math.tau / 16)) - y)
        return _over(paper(0.88, 0.95, 1.0), (0.45, 0.65, 0.85), waves)
    if name == "desert":
        sky = _over(paper(0.80, 0.92, 1.0), (1.0, 0.85, 0.3), cover(torch.hypot(x - 54, y - 9) - 6))
        return _over(sky, (0.88, 0.76, 0.52), cover(46 - 10 * torch.sin((x + 8) * (math.tau / 64)) - y))
    if name == "night":
        stars = cover(torch.hypot(x % 16 - 7.5, (y + 8 * (x // 16 % 2)) % 16 - 7.5) - 2.2)
        return _over(paper(0.10, 0.11, 0.25), (1.0, 1.0, 1.0), stars)
    if name == "forest":
        tops = cover(((x + 8) % 16 - 8).abs() * 1.9 + 8 - y)
        return _over(paper(0.75, 0.85, 0.80), (0.20, 0.34, 0.26), tops)
    if name == "city":
        heights = torch.tensor([40.0, 16, 28, 8, 36, 12, 24, 44])[(x // 8).long()]
        return _over(paper(0.80, 0.84, 0.90), (0.42, 0.43, 0.48), cover(heights - y))
    if name == "meadow":
        return _over(paper(0.80, 0.92, 1.0), (0.62, 0.80, 0.50), cover(32 - y))
    if name == "sunset":
        return _over(paper(0.55, 0.40, 0.60), (1.0, 0.72, 0.50), (1.3 / SIZE * y).clamp(0, 1))
    wall = _over(paper(0.90, 0.82, 0.72), (0.62, 0.80, 0.95), cover(torch.maximum((x - 12).abs(), (y - 12).abs()) - 8))
    return _over(wall, (0.50, 0.36, 0.26), cover(47.5 - y))  # room


def _paint(canvas: Canvas, style: str) -> Tensor:
    inside, distance = cover(canvas.distance), canvas.distance
    if style in PLACES:
        paper = _place(style, canvas.px, canvas.py) * (canvas.tone / 0.91)
    else:
        paper = texture(canvas, style).expand(3, SIZE, SIZE)
    colour = canvas.colour.expand(3, SIZE, SIZE)
    if style == "outlined":
        inside = cover((distance + 2.5).abs() - 2.5)
    elif style == "banded":
        colour = colour * (1 - 0.85 * (canvas.py // 8 % 2))
    elif style == "spotted":
        colour = colour + (1 - colour) * cover(torch.hypot(canvas.px % 16 - 11.5, canvas.py % 16 - 11.5) - 4.5)
    elif style == "halved":
        colour = colour * (1 - 0.85 * (canvas.x > 0))
    elif style == "shaded":
        colour = colour + (1 - colour) * (0.5 - 0.55 * canvas.y).clamp(0, 0.9)
    elif style == "bordered":
        colour = colour * (1 - 0.88 * cover(-4.5 - distance))
    elif style == "shadowed":
        paper = paper * (1 - 0.7 * inside.roll((7, 7), (0, 1)))
    elif style == "glowing":
        paper = paper + (colour - paper) * 0.9 * torch.exp(-distance.clamp(min=0) / 5)
    return (paper * (1 - inside) + colour * inside).clamp(0, 1)


LARGE = World(
    FAMILIES["shape"], FILLS + TEXTURES + PLACES, EIGHT_COLOURS, _paint, radius=19.5,
    colour_prompts=COLOUR_PROMPTS, shares=Shares(empty=0.08, both=0.40, object=0.18, style=0.20, coloured=0.5),
)  # fmt: skip
