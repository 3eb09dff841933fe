"""Pictures of figures: the leakage of every delta into every concept's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER = (40, 40, 48), (250, 250, 248)
CELL, MARGIN = 56, 16


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
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _shade(value: float, touched: bool) -> tuple[int, int, int]:
    depth = int(200 * min(max(value, 0.0), 1.0))
    return (246, 226 - depth, 222 - depth) if touched else (236 - depth,) * 3


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 4
