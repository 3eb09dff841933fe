"""What commands that read delta files and a model check before they do anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..concepts import file_name
from ..delta.concept_delta import ConceptDelta
from ..delta.format import check_replaceable
from ..errors import SepMEError
from ..files import check_writable
from .options import ModelOptions


def targets(out: Path, deltas: Sequence[ConceptDelta], files: Sequence[Path], otherwise: str) -> list[Path]:
    """Where new files of the same concepts go.

    Args:
        files: what the command reads, which is never replaced.
        otherwise: what is to be done if two of the files hold one concept.

    Raises:
        SepMEError: two hold one concept, the folder cannot be written, or a file there would be lost.
    """
    paths = [out / f"{file_name(d.concept.name)}.safetensors" for d in deltas]
    if len(set(paths)) < len(paths):
        raise SepMEError(f"Two of these files hold the same concept; {otherwise}.")
    for delta, path in zip(deltas, paths, strict=True):
        check_replaceable(path, delta.concept.name, files)
    check_writable(out)
    return paths


def model_of(
    deltas: Sequence[ConceptDelta], model: ModelOptions, draws: bool = False, training: bool = False
) -> tuple[Any, Any, list[str]]:
    """The model that deltas are used on, its text encoders alone where these are enough; its layers; and what is to be said.

    Args:
        draws, training: what it has to do beside reading prompts; see :meth:`ModelOptions.load`.

    Raises:
        SepMEError: what loading raises, or deltas of another model or encoder.
    """
    from ..delta.verify import check_encoder
    from ..model.layers import kv_fingerprint, shapes

    host = model.load(alone=not draws and not any(d.projections for d in deltas), training=training)
    layers = host.attention_layers() if hasattr(host, "attention_layers") else {}
    for delta in deltas if layers else ():
        delta.check_fits(shapes(layers))
    here = kv_fingerprint(layers)
    made = {d.concept.name: d.facts.kv_fingerprint for d in deltas if d.projections and d.facts.kv_fingerprint not in ("", here)}
    return (
        host,
        layers,
        [f"{n!r} was made on K/V weights {f}, this model has {here}." for n, f in made.items()] + check_encoder(host, deltas),
    )
