"""Pictures as files: PNG grids out, folders of pictures in."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import SepMEError
from .files import first_line, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

READABLE = {".png", ".jpg", ".jpeg", ".webp"}
MAX_PICTURES = 1000


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
    return _encoded(sheet, scale, "PNG")


def jpeg(sheet: Tensor) -> bytes:
    """Encode ``(3, H, W)`` uint8 as JPEG: a fourth of PNG's size, for pages with many pictures."""
    return _encoded(sheet, 1, "JPEG", quality=90)


def as_picture(sheet: Tensor) -> Image:
    """``(3, H, W)`` uint8 as PIL's."""
    from PIL import Image

    return Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())


def _encoded(sheet: Tensor, scale: int, kind: str, **options: int) -> bytes:
    from PIL import Image

    picture = as_picture(sheet)
    buffer = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, kind, **options)
    return buffer.getvalue()


def save_grid(images: Tensor, path: Path, columns: int | None = None, scale: int = 1) -> Path:
    """Write images ``(n, 3, h, w)`` in [-1, 1] as one PNG."""
    return write_atomically(path, png(grid(images, columns), scale))


def load_folder(folder: Path, size: int) -> tuple[Tensor, str]:
    """Read the PNG, JPEG and WebP files of a folder, by name: middle square, resized, transparency on white.

    Returns:
        images ``(n, 3, size, size)`` float32 in [-1, 1], and the SHA-256 of their pixels.

    Raises:
        SepMEError: no folder, no pictures or too many in it, or one that cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in READABLE and p.is_file())
    except OSError as error:
        raise SepMEError(f"The folder of pictures {folder} cannot be read ({error.strerror}); check the path.") from None
    if not 1 <= len(paths) <= MAX_PICTURES:
        raise SepMEError(f"{folder} holds {len(paths)} PNG, JPEG or WebP files; 1 to {MAX_PICTURES} are needed.")
    images = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    for image, path in zip(images, paths, strict=True):
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
                picture = ImageOps.exif_transpose(file).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = ImageOps.fit(Image.alpha_composite(white, picture).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SepMEError(f"The picture {path} cannot be read ({first_line(error)}); repair it or take it out of the folder.") from None
        image.copy_(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size, size, 3))
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, digest
