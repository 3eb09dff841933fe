"""Making a guard: image queries of the model on the concept's pictures, prompts found to get past it, ridge regressions of both its parts.

Rounds alternate with fits: soft prompts are learned against the guard as it is, one by an attacker who does not know it and one by one who
keeps it shut, and those that draw the concept join what it has to open for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..checks import check_numbers
from ..concepts import mentions
from ..delta.concept_delta import ConceptDelta
from ..delta.verify import beside_others
from ..errors import SepMEError
from ..model.families import CONTEXT
from ..model.layers import TextBlocks
from ..model.protocols import AttackHost, AttentionLayer, Denoiser, Encoding
from ..plan.gate import ratios
from ..plan.guard import MARGIN, Guard, balanced_ridge, both_precisions, fit_map
from ..plan.planner import Planner
from ..plan.tokens import CHUNK, encode
from .image_queries import DRAWS, conditioning, image_queries
from .make import Model
from .options import TrainOptions
from .soft_prompt import PLACEHOLDER, SoftPrompt
from .source import make_source

SHUT = 0.95  # of the threshold: where an attacker who knows it keeps its openness
WORKS = 0.5  # how much of the way from the empty prompt's error to the concept's own an attack has to go to count as one
WEIGHTS = {"own": 1.0, "beside": 1.0, "attacks": 2.0, "known": 1.0, "nearby": 1.0, "mixed": 1.0, "ordinary": 1.0}  # of the gate's examples
MIXED = 600  # prompts of nearby words in chance company
COMPANY = ("{0} {1}", "the {0} of a {1}, {2}", "{0} {1} {2} {3}", "my {0} with {1} and {2}", "{0} {1}, {2} {3}", "a {0}, a {1}")
OPENS = ("own", "beside", "attacks")  # kinds of examples that it opens for
MAP_WEIGHTS = {"own": 2.0, "beside": 3.0, "attacks": 2.0, "known": 0.3, "nearby": 0.3, "mixed": 0.3, "ordinary": 0.3}


@dataclass(frozen=True)
class GuardOptions:
    """How a guard is made.

    Attributes:
        queries: image queries per layer, fewer where layers are many and wide.
        readouts: answers of single heads that the gate is made of.
        rank: of the map.
        rounds: of attacks, two in each.
        tokens, steps, batch, learning_rate: of an attack.
    """

    queries: int = 12
    readouts: int = 64
    rank: int = 12
    rounds: int = 3
    tokens: int = 4
    steps: int = 60
    batch: int = 8
    learning_rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("queries", "readouts", "rank", "tokens", "steps", "batch")
        ranges = dict.fromkeys(counts, (1, 4096)) | {"rounds": (0, 100), "learning_rate": (1e-6, 10), "seed": (0, 2**62)}
        check_numbers(self, ranges, frozenset({*counts, "rounds", "seed"}))


def make_guard(
    planner: Planner,
    delta: ConceptDelta,
    host: Model,
    options: GuardOptions | None = None,
    check: Callable[[], None] = lambda: None,
) -> ConceptDelta:
    """The delta with a guard.

    Args:
        planner: of the book that the delta was made of, with nearby words.
        host: an :class:`AttackHost`, unless the options have no rounds.
        check: called between steps; it may raise :class:`~sepme.errors.Interrupted`.

    Raises:
        SepMEError: the delta edits layers; the model is no UNet; no nearby words were looked for.
    """
    if not delta.edits_context or delta.projections:
        raise SepMEError("A guard belongs to an edit of the context alone; make the delta with --edit context.")
    layers = None if host is None or isinstance(host, TextBlocks) else host.attention_layers()
    if host is None or not layers or isinstance(host, TextBlocks) or isinstance(layers, TextBlocks):
        raise SepMEError("Guards read a UNet's cross-attention; this model has none.")
    if not planner.prompts.nearby.found.words:
        raise SepMEError("A guard learns what to leave alone from nearby words; look for some (--nearby 200).")
    options, on_progress = options or GuardOptions(), planner.prompts.on_progress
    maker = _Maker(planner, delta, host, layers, options, check)
    maker.fit()
    for i in range(2 * options.rounds):
        on_progress(f"Guard of {delta.concept.name!r}: attacks", i, 2 * options.rounds)
        maker.attack(aware=i % 2 == 1)
        if i % 2:
            maker.fit()
    on_progress(f"Guard of {delta.concept.name!r}: attacks", 2 * options.rounds, 2 * options.rounds)
    guarded = replace(delta, guard=maker.guard)
    near = beside_others(planner.prompts.encoder, guarded, planner.prompts.nearby.found)
    touched = [bool(row) for c in maker.held_out.split(CHUNK) for row in guarded.statistic(c) > delta.gate]
    certificate = replace(
        delta.certificate, collateral=near.collateral, misses=near.misses, false_touch_rate=sum(touched) / max(len(touched), 1)
    )
    facts = {"certificate": certificate.to_json(), "guard": {"options": asdict(options)} | maker.facts}
    return replace(guarded, info={**delta.info, **facts})


class _Maker:
    """One guard in the making.

    Attributes:
        contexts: by kind of example, ``(rows, tokens, d_in)`` float32: what it opens for (own, beside, attacks), and the rest.
        facts: what is known of it.
    """

    def __init__(
        self,
        planner: Planner,
        delta: ConceptDelta,
        host: Denoiser,
        layers: Mapping[str, AttentionLayer],
        options: GuardOptions,
        check: Callable[[], None],
    ) -> None:
        self.planner, self.delta, self.host, self.options, self.check = planner, delta, host, options, check
        self.name, self.generator = delta.concept.name, torch.Generator().manual_seed(options.seed)
        prompts = planner.prompts
        self.own, self.empty = prompts.encodings[self.name], prompts.empty
        self.anchor = prompts.anchors[self.name]
        beside = prompts.nearby.found.beside[self.name].calibration
        others = [e.context for n, e in prompts.encodings.items() if n != self.name]
        preserved = [e.context for _, e in prompts.preserved.batches("Preserve file: guard")]
        self.contexts: dict[str, Tensor] = {
            "own": self.own.context.float(),
            "beside": self._read(beside),
            "known": _joined([self.empty.context, *others, *preserved]),
            "nearby": _joined([e.context for e in prompts.nearby.encodings]),
            "mixed": self._read(self._mixed(prompts.nearby.found.words)),
            "ordinary": self._read([p for p in prompts.ordinary[0] if not mentions(p, self.name)]),
        }
        self.held_out = self._read([p for p in prompts.ordinary[1] if not mentions(p, self.name)])
        synonyms = prompts.nearby.found.synonyms.get(self.name, ())
        self.without = self._read(_replaced(beside, (self.name, *synonyms), delta.concept.anchor))
        source = make_source(host, self.own, self.empty, self.anchor, TrainOptions.for_mode(trajectories=options.batch), None, check)
        self.draw = lambda: source.draw(self.generator, options.batch)
        self.layers = image_queries(host, layers, self.own, self.draw, options.queries, self.generator, check)
        self.features = {kind: self._features(c) for kind, c in self.contexts.items()}
        self.facts: dict[str, Any] = {}

    def _mixed(self, words: Sequence[str]) -> list[str]:
        """Nearby words in chance company."""
        drawn = torch.randint(len(words), (MIXED, 4), generator=self.generator).tolist()
        return [COMPANY[i % len(COMPANY)].format(*(words[j] for j in row)) for i, row in enumerate(drawn)]

    def _read(self, prompts: Sequence[str]) -> Tensor:
        return encode(self.planner.prompts.encoder, prompts).context.float()

    def _features(self, context: Tensor) -> list[Tensor]:
        """Answers to all queries beside the empty prompt's, by layer ``(rows, queries, heads, d)``."""
        empty = self.empty.context.float()
        return [torch.cat([q.answers(c) for c in context.split(CHUNK // 4)]) - q.answers(empty) for q in self.layers]

    def fit(self) -> None:
        """Fit both parts on the examples that there are now."""
        groups = [(len(c), float(kind in OPENS), WEIGHTS[kind]) for kind, c in self.contexts.items()]
        answers = [torch.cat(parts) for parts in zip(*self.features.values(), strict=True)]
        alpha = balanced_ridge(_kernel([a.flatten(1) for a in answers]), groups)
        moved = [torch.einsum("nqhd,qhd->nqh", a.double(), torch.einsum("n,nqhd->qhd", alpha, a.double())).std(dim=0) for a in answers]
        units = [(layer, *divmod(i, m.shape[1])) for layer, m in enumerate(moved) for i in range(m.numel())]
        best = torch.cat([m.flatten() for m in moved]).topk(min(self.options.readouts, len(units))).indices.tolist()
        chosen = [units[i] for i in best]
        kept = [answers[layer][:, q, h] for layer, q, h in chosen]
        alpha = balanced_ridge(_kernel(kept), groups)
        queries = torch.stack([self.layers[layer].asked[q, h] for layer, q, h in chosen])
        weights = [(alpha @ a.double()).float() for a in kept]
        values = torch.stack([w @ self.layers[layer].values[h] for (layer, _, h), w in zip(chosen, weights, strict=True)])
        self.guard = self._with_threshold(Guard(queries, values, 0.0, self.empty.context[0].float(), *self._map()))

    def _with_threshold(self, guard: Guard) -> Guard:
        """Above all that must stay shut, in half precision too, with some of the room that there is."""
        opened = [guard.readout(c) for kind, c in self.contexts.items() if kind in OPENS]
        shut = [guard.readout(r) for kind, c in self.contexts.items() if kind not in OPENS for r in both_precisions(c)]
        high, low = float(torch.cat(opened).min()), float(torch.cat(shut).max())
        self.facts = {"shut_below": low, "open_above": high, "attacks": len(self.contexts.get("attacks", ()))}
        return replace(guard, threshold=low + MARGIN * max(high - low, abs(low) * MARGIN))

    def _map(self) -> tuple[Tensor, Tensor]:
        """The map, fitted on contexts as the delta edits them."""
        empty, anchor = self.empty.context.float(), self.anchor.context.float()
        targets = self.contexts | {kind: anchor for kind in ("own", "attacks") if kind in self.contexts}
        targets["beside"] = self.without
        parts = {}
        for kind, context in self.contexts.items():
            given = self._linear(context) if kind in OPENS else context
            longest = max(given.shape[1], targets[kind].shape[1])  # of prompts of several chunks the shorter one is repeated
            x, y, nothing = (c.repeat(1, longest // c.shape[1], 1) for c in (given, targets[kind], empty))
            parts[kind] = ((x - nothing).flatten(0, 1), (y - nothing).expand_as(x).flatten(0, 1), MAP_WEIGHTS[kind])
        return fit_map(parts, self.options.rank)

    def _linear(self, context: Tensor) -> Tensor:
        down, up = self.delta.down.to(context.device), self.delta.up_factor(CONTEXT).to(context.device)
        return context + (context @ down.T) @ up.T

    def attack(self, aware: bool) -> None:
        """Learn a soft prompt that draws the concept; it joins the examples if it does.

        Args:
            aware: by an attacker who keeps the guard shut.
        """
        host = cast(AttackHost, self.host)
        soft = SoftPrompt(host, PLACEHOLDER, self.options.tokens)

        def error(encoding: Encoding, erased: bool) -> Tensor:
            x_t, t, which = self.draw()
            with torch.no_grad():
                wanted = host.predict(x_t, t, *conditioning(self.own.rows(which)))
            rows = encoding.rows([0] * len(t))
            context = self.edited(rows.context) if erased else rows.context
            return (host.predict(x_t, t, *conditioning(rows._replace(context=context))).float() - wanted.float()).square().mean()

        def loss(encoding: Encoding) -> Tensor:
            self.check()
            found = error(encoding, not aware)
            return found + (self.openness(encoding.context) - SHUT).clamp_min(0).sum() if aware else found

        soft.learn(loss, self.options.steps, self.options.learning_rate)
        found = soft.encode()
        with torch.no_grad():
            reached, nothing = (sum(float(error(e, False)) for _ in range(DRAWS)) for e in (found, self.empty))
        if reached < (1 - WORKS) * nothing:
            self._add(found.context.float().cpu())

    def _add(self, attack: Tensor) -> None:
        """One more context that it has to open for."""
        features = self._features(attack)
        if "attacks" in self.contexts:
            attack = _joined([self.contexts["attacks"], attack])
            features = [torch.cat(pair) for pair in zip(self.features["attacks"], features, strict=True)]
        self.contexts["attacks"], self.features["attacks"] = attack, features

    def edited(self, context: Tensor) -> Tensor:
        """A context as the delta and its guard leave it, differentiable but for the decision."""
        c = context.float()
        with torch.no_grad():
            opens = self.guard.opens(c) | (ratios(c, self.delta.down) > self.delta.gate)
        return torch.where(opens[:, None, None], self.guard.reduced(self._linear(c)), c).to(context.dtype)

    def openness(self, context: Tensor) -> Tensor:
        """Of the guard or of the delta's gate, whichever is opened further: above 1 it is open."""
        return torch.maximum(self.guard.openness(context.float()), ratios(context.float(), self.delta.down) / self.delta.gate)


def _replaced(prompts: Sequence[str], names: Sequence[str], anchor: str) -> list[str]:
    """Prompts in which an anchor stands where a name stood, as a word of its own."""
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    named = re.compile(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)")
    return [named.sub(lambda _: anchor, p).strip() for p in prompts]


def _kernel(features: Sequence[Tensor]) -> Tensor:
    """Inner products ``(rows, rows)`` float64 of features ``(rows, d)`` side by side."""
    total = torch.zeros(len(features[0]), len(features[0]), dtype=torch.float64)
    for part in features:
        total += part.double() @ part.double().T
    return total


def _joined(contexts: Sequence[Tensor]) -> Tensor:
    """Contexts below each other, all of the longest's length."""
    longest = max(c.shape[1] for c in contexts)
    return torch.cat([c.float().repeat(1, longest // c.shape[1], 1) for c in contexts])
