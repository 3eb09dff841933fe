"""The small picture in a delta's header: what a prompt of the concept draws, stock beside erased.

It stands under ``modelspec.thumbnail`` as that standard has it, a data URL, so that other tools show it too. Like everything under
``modelspec.`` it is for show: no hash of the file depends on it.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..errors import SepMEError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .concept_delta import ConceptDelta

    Draw = Callable[[str, Sequence[ConceptDelta]], Image]  # a picture of a prompt with these deltas in it, always of one seed

log = logging.getLogger("sepme")

KEY = "modelspec.thumbnail"
SIDE = 128  # pixels of each of the two pictures
MAX = 256 << 10  # characters of one that is read: other tools make larger ones
CPU_PARAMETERS = 60_000_000  # of a model that draws in seconds without a GPU
_DATA_URL = re.compile(r"data:(image/(?:jpeg|png|webp));base64,([A-Za-z0-9+/]+=*)")


class Picture(NamedTuple):
    """A picture file and its media type."""

    kind: str
    data: bytes


def bearable(device: str, parameters: int) -> bool:
    """Whether a model is quick enough to draw a thumbnail with: any on a GPU, small ones on a CPU."""
    return device != "cpu" or parameters <= CPU_PARAMETERS


def beside(stock: Image, erased: Image) -> str:
    """Two pictures side by side as a data URL of a JPEG, ``2 SIDE`` pixels wide."""
    from PIL import Image

    both = Image.new("RGB", (2 * SIDE, SIDE))
    for i, picture in enumerate((stock, erased)):
        both.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (i * SIDE, 0))
    file = io.BytesIO()
    both.save(file, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def with_thumbnail(delta: ConceptDelta, draw: Draw) -> ConceptDelta:
    """A delta with its picture, of the concept's first prompt; as it is where drawing fails: no training is lost for want of a picture."""
    prompt = delta.concept.prompts[0]
    try:
        return replace(delta, thumbnail=beside(draw(prompt, ()), draw(prompt, (delta,))))
    except (RuntimeError, SepMEError) as error:
        log.warning("No picture for the file of %r: %s", delta.concept.name, error)
        return delta


def picture(text: str) -> Picture | None:
    """The picture of a header's text; None where it is no JPEG, PNG or WebP as a data URL, or a large one."""
    match = _DATA_URL.fullmatch(text) if len(text) <= MAX else None
    if match is None:
        return None
    try:
        return Picture(match[1], base64.b64decode(match[2], validate=True))
    except binascii.Error:
        return None
