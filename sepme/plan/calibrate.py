"""Gates and certificates of planned directions, measured on every known, preserved and ordinary prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..concepts import mentions
from .encoded_book import EncodedBook
from .gate import Certificate, certify, extremes, side_by_side
from .nearby import Beside, least, misses, nearby_values
from .tally import Tally
from .tokens import CHUNK, encode

MANY = 128  # concepts from which on gates bound what half precision does instead of measuring it


def calibrate(
    book: EncodedBook, names: Sequence[str], found: Sequence[tuple[Tensor, float, int]], mode: str, gate: float | None = None
) -> list[tuple[float, Certificate]]:
    """Gate γ (calibrated unless given) and certificate of each of these concepts.

    Args:
        found: per concept D ``(d_in, k)``, the share of its energy along D, and the number of directions D was chosen from.
        mode: how D was chosen.
    """
    downs = [basis.T.float().contiguous() for basis, _, _ in found]
    abreast, measured = side_by_side(downs), len(book.names) <= MANY
    worst, least_own = _extremes_by_concept(book, abreast, measured)
    table = {n: v.tolist() for n, v in worst.items()}
    halves = [(half, _ordinary(book, half, abreast, measured)) for half in book.ordinary]
    found_words, encoder = book.nearby.found, book.encoder
    near = [extremes(e.context, abreast, measured)[0].amax(dim=0) for e in book.nearby.encodings]
    held_words = nearby_values(encoder, found_words, abreast, measured, book.on_progress)
    result = []
    for i, (name, down, (_, energy, null_dims)) in enumerate(zip(names, downs, found, strict=True)):
        leakage = {n: v[i] for n, v in table.items() if n != name}
        for other, free in book.carriers(name).items():
            del leakage[other]
            if any(free):
                leakage[other] = float(extremes(book.encodings[other].context[free], down[:, None], measured)[0].max())
        calibration, held_out = (
            [value for prompt, value in zip(half, values[i], strict=True) if not mentions(prompt, name)] if half else []
            for half, values in halves
        )
        beside = least(encoder, found_words.beside.get(name, Beside()).calibration, down, measured)
        figures = float(least_own[name][i]), [*calibration, *(float(v[i]) for v in near)], held_out
        found_gate, certificate = certify(leakage, *figures, energy, len(down), null_dims, mode, gate, list(beside.values()))
        if found_words.words:
            collateral = Tally.above({word: max(v[i].item() for v in values.values()) - found_gate for word, values in held_words.items()})
            certificate = replace(certificate, collateral=collateral, misses=misses(encoder, found_words, name, down, found_gate, measured))
        result.append((found_gate, certificate))
    return result


def _ordinary(book: EncodedBook, prompts: Sequence[str], abreast: Tensor, measured: bool) -> list[list[float]]:
    """Largest statistic of each ordinary prompt, by planned concept; a few hundred prompts are in memory at a time."""
    parts = []
    for i in range(0, len(prompts), CHUNK):
        book.on_progress("Ordinary prompts", i, len(prompts))
        parts.append(extremes(encode(book.encoder, prompts[i : i + CHUNK]).context, abreast, measured)[0])
    return torch.cat(parts).T.tolist() if parts else []


def _extremes_by_concept(book: EncodedBook, abreast: Tensor, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Largest statistic by whose prompts, and smallest by concept; one value per planned concept."""
    worst = {"(empty prompt)": extremes(book.empty.context, abreast, measured)[0].amax(dim=0)}
    least: dict[str, Tensor] = {}
    for group in book.groups(book.names):
        book.on_progress("Gates", len(least), len(book.names))
        contexts = [book.encodings[n].context for n in group]
        most, smallest = (v.split([len(c) for c in contexts]) for v in extremes(torch.cat(contexts), abreast, measured))
        worst |= {n: v.amax(dim=0) for n, v in zip(group, most, strict=True)}
        least |= {n: v.amin(dim=0) for n, v in zip(group, smallest, strict=True)}
    for _, encoding in book.preserved.batches("Preserve file: gates"):
        values = extremes(encoding.context, abreast, measured)[0].amax(dim=0)
        worst["(preserved prompts)"] = torch.maximum(worst.get("(preserved prompts)", values), values)
    return worst, least
