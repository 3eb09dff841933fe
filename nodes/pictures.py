"""Pictures of figures and of pictures: the leakage of every delta into every concept's prompts, grids with names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER = (40, 40, 48), (250, 250, 248)
CELL, MARGIN = 56, 16
SMALLEST, LARGEST = 128, 512  # pixels of a picture's width in a grid


def heat_map(matrix: Tensor, rows: Sequence[str], columns: Sequence[str], gates: Sequence[float]) -> Tensor:
    """IMAGE ``(1, h, w, 3)`` of a leakage matrix: red cells pass the gate of their row, grey ones stay shut, darker is more."""
    font = _font(13)
    left = 2 * MARGIN + max(_width(font, name) for name in rows)
    top = 2 * MARGIN + max(_width(font, name) for name in columns)
    size = (left + CELL * len(columns) + MARGIN, top + CELL * len(rows) + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for j, name in enumerate(columns):
        label = Image.new("RGB", (top - 2 * MARGIN + 4, 18), PAPER)
        ImageDraw.Draw(label).text((0, 0), name, fill=INK, font=font)
        picture.paste(label.rotate(90, expand=True), (left + j * CELL + CELL // 2 - 9, MARGIN))
    for i, name in enumerate(rows):
        draw.text((MARGIN, top + i * CELL + CELL // 2 - 8), name, fill=INK, font=font)
        for j, value in enumerate(matrix[i].tolist()):
            x, y = left + j * CELL, top + i * CELL
            draw.rectangle([x, y, x + CELL - 2, y + CELL - 2], fill=_shade(value, value > gates[i]))
            draw.text((x + 10, y + CELL // 2 - 8), f"{value:.3f}", fill=PAPER if value > 0.6 else INK, font=font)
    return _image(picture)


def sheet(images: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str]) -> Tensor:
    """IMAGE ``(1, H, W, 3)``: images ``(h, w, 3)`` in 0 to 1 in rows with names, columns with names above."""
    height, width, _ = images[0][0].shape
    scale = min(max(width, SMALLEST), LARGEST) / width
    width, height, font = round(scale * width), round(scale * height), _font(16)
    left, top = 2 * MARGIN + max(_width(font, name) for name in rows), 2 * MARGIN + 20
    picture = Image.new("RGB", (left + (width + 4) * len(columns) + MARGIN, top + (height + 4) * len(rows) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for j, name in enumerate(columns):
        draw.text((left + j * (width + 4) + width // 2, MARGIN), name, fill=INK, font=font, anchor="ma")
    for i, name in enumerate(rows):
        draw.text((MARGIN, top + i * (height + 4) + height // 2), name, fill=INK, font=font, anchor="lm")
        for j, image in enumerate(images[i]):
            cell = Image.fromarray((image[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy())
            kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
            picture.paste(cell.resize((width, height), kind), (left + j * (width + 4), top + i * (height + 4)))
    return _image(picture)


def beside(before: Tensor, after: Tensor) -> Tensor:
    """IMAGE ``(n, h, 2 w, 3)`` of images ``(n, h, w, 3)``."""
    return torch.cat([before, after], dim=2)


def _image(picture: Any) -> Tensor:
    """IMAGE ``(1, h, w, 3)`` of a PIL picture."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _shade(value: float, touched: bool) -> tuple[int, int, int]:
    depth = int(200 * min(max(value, 0.0), 1.0))
    return (246, 226 - depth, 222 - depth) if touched else (236 - depth,) * 3


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 4
