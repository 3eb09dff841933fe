"""Pictures as files: PNG grids."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from .delta import write_atomically


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Lay images ``(n, 3, h, w)`` in [-1, 1] in rows of ``columns`` on white: ``(3, H, W)`` uint8."""
    n, _, h, w = images.shape
    columns = columns or n
    rows = -(-n // columns)
    sheet = torch.full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i in range(n):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[:, y : y + h, x : x + w] = pixels[i]
    return sheet


def png(sheet: Tensor, scale: int = 1) -> bytes:
    """Encode ``(3, H, W)`` uint8 as PNG, enlarged by whole pixels."""
    from PIL import Image

    picture = Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def save_grid(images: Tensor, path: Path, columns: int | None = None, scale: int = 1) -> Path:
    """Write images ``(n, 3, h, w)`` in [-1, 1] as one PNG."""
    return write_atomically(path, png(grid(images, columns), scale))
