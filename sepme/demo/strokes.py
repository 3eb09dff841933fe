"""What a picture of a drawing world is made of: the canvas, soft edges and textures behind the figure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Canvas(NamedTuple):
    """Pixel coordinates ``px, py`` and figure coordinates ``x, y`` (units of the radius, y up), ``(64, 64)`` each;
    ``distance`` to the figure's outline in pixels, negative inside; ``colour`` ``(3, 1, 1)``; grey of the paper and of the ink.
    """

    px: Tensor
    py: Tensor
    x: Tensor
    y: Tensor
    distance: Tensor
    colour: Tensor
    tone: float
    ink: float


def cover(signed: Tensor) -> Tensor:
    """How much of each pixel lies inside a signed distance."""
    return (0.5 - signed).clamp(0, 1)


def texture(canvas: Canvas, style: str) -> Tensor:
    """Paper with a texture, ``(64, 64)``; bare for a style that is none. They repeat in step with the latents' 8 x 8 pixel cells."""
    px, py, ink = canvas.px, canvas.py, canvas.ink
    dark = torch.zeros_like(px)
    if style == "striped":
        dark = (py // 8 % 2).float()
    elif style == "columned":
        dark = (px // 8 % 2).float()
    elif style == "dotted":
        dark = cover(torch.hypot(px % 16 - 11.5, py % 16 - 11.5) - 4.8)
    elif style == "checkered":
        dark = ((px // 16 + py // 16) % 2).float()
    elif style == "slanted":
        dark = ((px + py) // 16 % 2).float()
    elif style == "ringed":
        dark = (torch.hypot(px - 31.5, py - 31.5) // 8 % 2).float()
    elif style == "latticed":
        dark = 1 - cover(3.5 - torch.minimum(px % 16, py % 16))
    elif style == "framed":
        dark, ink = 1 - cover(torch.maximum((px - 31.5).abs(), (py - 31.5).abs()) - 24), ink * 0.3
    return canvas.tone + (ink - canvas.tone) * dark
