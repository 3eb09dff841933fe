"""Certificates measured again, with a real text encoder and the prompts that the deltas themselves name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..concepts import ConceptBook, mentions
from ..errors import SepMEError
from ..model.encoder_fingerprint import RELATED, SAME, EncoderFingerprint
from ..model.protocols import Encoding, TextEncoder, clip_skip, other_texts
from ..plan.gate import affordable, leakage_matrix, ratios
from ..plan.guard import both_precisions
from ..plan.nearby import Nearby
from ..plan.pooled import residual
from ..plan.preserved import PreserveFile
from ..plan.tally import Tally
from ..plan.tokens import CHUNK, encode
from ..progress import OnProgress, silent
from .concept_delta import ConceptDelta, check_apart


@dataclass(frozen=True)
class Check:
    """One delta's certificate, measured.

    Attributes:
        own_min: smallest gate statistic of its own prompts.
        own_touched: share of them that pass the gate.
        leakage_linear: worst ``‖c D‖ / ‖c‖`` by whose prompts.
        leakage_gated: 0 where the gate stays closed.
        false_touch_rate: share of ordinary prompts that pass the gate.
        pooled: what becomes of the pooled vector along the concept, and the share that is left; None without one.
        holds: the gate opens for all of its own prompts and for none that must not change.
        collateral, misses: of nearby words and of its own prompts, see :class:`~sepme.plan.gate.Certificate`; None if not measured.
        examples: prompts of the nearby words that change most.
        verdict: the certificate as measured now, in a sentence.
        parts: of its edits of the other texts that the model is given, by text; ``holds`` counts them too.
    """

    concept: str
    gate: float
    own_min: float
    own_touched: float
    leakage_linear: dict[str, float]
    leakage_gated: dict[str, float]
    false_touch_rate: float
    pooled: dict[str, Any] | None
    holds: bool
    collateral: Tally | None = None
    misses: Tally | None = None
    examples: tuple[str, ...] = ()
    verdict: str = ""
    parts: Mapping[str, Check] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """Checks of several deltas.

    Attributes:
        matrix: ``(deltas, deltas)``, worst gate statistic of delta i on the prompts of delta j.
    """

    checks: tuple[Check, ...]
    matrix: Tensor
    warnings: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether the certificate of every delta holds."""
        return all(c.holds for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """All of it for ``--json``."""
        checks = [asdict(c) for c in self.checks]
        return {"deltas": checks, "matrix": self.matrix.tolist(), "warnings": list(self.warnings), "holds": self.holds}


def verify(
    encoder: TextEncoder,
    deltas: Sequence[ConceptDelta],
    preserve: str | Path | None = None,
    on_progress: OnProgress = silent,
    nearby: int = 0,
) -> Verification:
    """Measure gates and leakage of deltas on their own, known, preserved and ordinary prompts.

    Args:
        preserve: text file of prompts that must not change; deltas hold only the digest of a long list.
        nearby: how many words near each concept are measured too.

    Raises:
        SepMEError: two deltas of one concept; the preserve file cannot be read.
    """
    check_apart(deltas)
    own = {d.concept.name: encode(encoder, d.concept.prompts) for d in deltas}
    empty = encode(encoder, [""])
    strangers = affordable(empty.context)[1::2]  # the half that no gate was calibrated on
    ordinary = encode(encoder, strangers).context
    worst, warnings = _preserved(encoder, deltas, preserve, on_progress)
    checks = []
    for i, delta in enumerate(deltas):
        on_progress("Verifying", i, len(deltas))
        name = delta.concept.name
        statistic = delta.statistic(own[name].context)
        prompts = {c.name: [p for p in c.prompts if not mentions(p, name)] for c in delta.known}
        leakage = {n: _worst(encode(encoder, p), delta) for n, p in prompts.items() if p}
        leakage |= {"(empty prompt)": _worst(empty, delta)} | ({"(preserved prompts)": worst[name]} if name in worst else {})
        foreign = delta.statistic(ordinary)[[not mentions(p, name) for p in strangers]]
        gated = {n: linear if statistic > delta.gate else 0.0 for n, (linear, statistic) in leakage.items()}
        check = (
            Check(
                name, delta.gate, float(statistic.min()), float((statistic > delta.gate).float().mean()),
                {n: linear for n, (linear, _) in leakage.items()}, gated, float((foreign > delta.gate).float().mean()),
                _pooled(delta, own[name], encode(encoder, [delta.concept.anchor])),
                bool((statistic > delta.gate).all()) and not any(gated.values()),
            )
        )  # fmt: skip
        checks.append(_with_nearby(check, encoder, delta, nearby, on_progress))
    matrix = leakage_matrix({d.concept.name: d.down for d in deltas}, {n: e.context for n, e in own.items()})
    measured = Verification(tuple(checks), matrix, tuple(warnings))
    return _with_parts(measured, encoder, deltas, preserve, on_progress)


def _with_parts(
    measured: Verification, encoder: TextEncoder, deltas: Sequence[ConceptDelta], preserve: str | Path | None, on_progress: OnProgress
) -> Verification:
    """What was measured of the context, with the edits of the other texts that the model is given, by their own encoders."""
    texts, warnings = other_texts(encoder), list(measured.warnings)
    found: dict[str, dict[str, Check]] = {c.concept: {} for c in measured.checks}
    for text in dict.fromkeys(t for d in deltas for t in d.parts):
        edited = [d for d in deltas if text in d.parts]
        if text not in texts:
            names = ", ".join(repr(d.concept.name) for d in edited)
            warnings.append(
                f"The edits of the text {text} ({names}) were not checked, as this encoder does not make it; verify them in ComfyUI."
            )
            continue
        shared = ("known", "preserve")  # what stands in the file once
        own = [replace(d.parts[text], info=dict(d.parts[text].info) | {k: d.info[k] for k in shared if k in d.info}) for d in edited]
        warnings += check_encoder(texts[text], own)
        for check in verify(texts[text], own, preserve, on_progress).checks:
            found[check.concept][text] = check
    checks = (
        replace(c, parts=found[c.concept], holds=c.holds and all(p.holds for p in found[c.concept].values())) for c in measured.checks
    )
    return replace(measured, checks=tuple(checks), warnings=tuple(warnings))


def _with_nearby(check: Check, encoder: TextEncoder, delta: ConceptDelta, nearby: int, on_progress: OnProgress) -> Check:
    """A check with what becomes of nearby words, and the verdict."""
    certificate = replace(delta.certificate, leakage_gated=check.leakage_gated, false_touch_rate=check.false_touch_rate)
    book, said = ConceptBook((delta.concept, *delta.known), tuple(delta.preserve.prompts)), {check.concept: delta.facts.nearby.said}
    found = Nearby.of(encoder, book, nearby, on_progress, said)
    if not found.words:
        return replace(check, verdict=certificate.verdict(delta.gate))
    near = beside_others(encoder, delta, found, on_progress)
    verdict = replace(certificate, collateral=near.collateral, misses=near.misses).verdict(delta.gate)
    return replace(check, collateral=near.collateral, misses=near.misses, examples=near.examples, verdict=verdict)


class BesideOthers(NamedTuple):
    """What a delta does to prompts that nothing was planned with; ``examples``: those with nearby words that change most."""

    collateral: Tally
    misses: Tally
    examples: tuple[str, ...]


def beside_others(encoder: TextEncoder, delta: ConceptDelta, found: Nearby, on_progress: OnProgress = silent) -> BesideOthers:
    """Measure a delta on the held-out prompts of nearby words, and on those of its own concept beside others."""
    excess = {
        p: v - delta.gate for p, v in _extremes(encoder, delta, [p for ps in found.held_out.values() for p in ps], on_progress).items()
    }
    own = _extremes(encoder, delta, found.beside[delta.concept.name].held_out, on_progress, least=True)
    words = {word: max(excess[p] for p in given) for word, given in found.held_out.items() if given}
    return BesideOthers(Tally.above(words), Tally.above({p: delta.gate - v for p, v in own.items()}), Tally.above(excess).worst)


def _extremes(
    encoder: TextEncoder, delta: ConceptDelta, prompts: Sequence[str], on_progress: OnProgress, least: bool = False
) -> dict[str, float]:
    """What the gate compares with its threshold, the largest (or smallest) that half precision makes of each prompt."""
    found: dict[str, float] = {}
    for i in range(0, len(prompts), CHUNK):
        on_progress("Nearby words: measuring", i, len(prompts))
        part = prompts[i : i + CHUNK]
        values = torch.stack([delta.statistic(c) for c in both_precisions(encode(encoder, part).context)])
        found |= zip(part, (values.amin(dim=0) if least else values.amax(dim=0)).tolist(), strict=True)
    return found


def check_encoder(encoder: TextEncoder, deltas: Sequence[ConceptDelta]) -> list[str]:
    """:func:`encoder_warnings` of an encoder that is at hand."""
    known = any(d.facts.text_encoder is not None for d in deltas)
    return encoder_warnings(deltas, clip_skip(encoder), EncoderFingerprint.of(encoder) if known else None)


def encoder_warnings(deltas: Sequence[ConceptDelta], skipped: int, fingerprint: EncoderFingerprint | None = None) -> list[str]:
    """What is to be said of deltas that were made with another clip skip or another version of the text encoder.

    Args:
        skipped: how many of CLIP's last layers are skipped now.
        fingerprint: of the encoder; None where it is not at hand.

    Raises:
        SepMEError: a delta was made with another text encoder altogether.
    """
    warnings = []
    for delta in deltas:
        name, made = delta.concept.name, delta.facts
        distance = 0.0 if fingerprint is None or made.text_encoder is None else made.text_encoder.distance(fingerprint)
        if distance > RELATED:
            raise SepMEError(
                f"The delta of {name!r} was made with another text encoder than this model's; train the concept with this one, or load a "
                "model that reads the other."
            )
        if made.clip_skip != skipped:
            warnings.append(
                f"{name!r} was made with {made.clip_skip} of CLIP's last layers skipped, here {skipped} are; its gate may stay shut, set "
                "the same."
            )
        elif distance > SAME:
            warnings.append(
                f"{name!r} was made with another version or layer (clip skip) of this text encoder; its gate may stay shut, verify it here."
            )
    return warnings


def check_named_encoder(deltas: Sequence[ConceptDelta], reads: str) -> None:
    """Refuse edits of the context that another text encoder made than a model reads, where both are known by name.

    Args:
        reads: of the model, by :func:`~sepme.model.families.encoder_of`.

    Raises:
        SepMEError: there is one.
    """
    for delta in deltas:
        made = delta.facts.text_encoder
        if delta.edits_context and reads and made is not None and made.name not in ("", reads):
            raise SepMEError(
                f"The delta of {delta.concept.name!r} was made with the text encoder {made.name}, and this model reads {reads}; train the "
                "concept with this model's."
            )


def _worst(encoding: Encoding, delta: ConceptDelta) -> tuple[float, float]:
    """The worst ``‖c D‖ / ‖c‖``, and the worst of what opens the gate or a guard."""
    return float(ratios(encoding.context, delta.down).max()), float(delta.statistic(encoding.context).max())


def _preserved(
    encoder: TextEncoder, deltas: Sequence[ConceptDelta], path: str | Path | None, on_progress: OnProgress
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Worst statistics by concept (:func:`_worst`) on preserved prompts, the listed and those of the file; and what was not checked."""
    listed = {d.concept.name: d.preserve.prompts for d in deltas}
    encodings = {prompts: encode(encoder, prompts) for prompts in set(listed.values()) if prompts}
    worst = {d.concept.name: _worst(encodings[p], d) for d in deltas if (p := listed[d.concept.name])}
    digests = {p: hashlib.sha256("".join(f"{line}\n" for line in p).encode()) for p in set(listed.values())}
    if path is not None:
        file = PreserveFile(path)
        for prompts, done in file.batches():
            encoding = encode(encoder, prompts)
            for delta in deltas:
                before = worst.get(delta.concept.name, (0.0, 0.0))
                worst[delta.concept.name] = max(before[0], (now := _worst(encoding, delta))[0]), max(before[1], now[1])
            for digest in digests.values():
                digest.update("".join(f"{p}\n" for p in prompts).encode())
            on_progress("Preserve file", done, file.size)
    warnings = []
    for delta in deltas:
        name, facts = delta.concept.name, delta.preserve
        if facts.sha256 in ("", digests[listed[name]].hexdigest()):
            continue
        if path is None:
            missing = facts.count - len(listed[name])
            warnings.append(f"{missing} preserved prompts of {name!r} are not in its file and were not checked; give them with --preserve.")
        else:
            warnings.append(f"{path} is not the preserve file that {name!r} was made with; it was checked all the same.")
    return worst, warnings


def _pooled(delta: ConceptDelta, own: Encoding, anchor: Encoding) -> dict[str, Any] | None:
    if own.pooled is None or anchor.pooled is None:
        return None
    return {"mode": "replaced" if delta.pooled is not None else "left", "residual": residual(delta.pooled, own.pooled, anchor.pooled)}
