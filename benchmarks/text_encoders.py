"""Planning on a text encoder whose prompts have any number of tokens: what is put in a token's place, sinks, what it costs.

all-MiniLM-L6-v2 (22 million weights, d_in 384) reads every prompt at its own length. Twelve concepts are planned and solved in closed
form on three prompts each; what the edit does is measured on six other prompts each. Run in a checkout whose environment has the test
extra: ``python benchmarks/text_encoders.py``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")  # instead of this folder

from planning import MiniLM  # noqa: E402

from sepme.concepts import Concept, ConceptBook  # noqa: E402
from sepme.errors import SepMEError  # noqa: E402
from sepme.plan import encoded_book  # noqa: E402
from sepme.plan.gate import ratios  # noqa: E402
from sepme.plan.planner import Planner  # noqa: E402
from sepme.plan.tokens import encode, present  # noqa: E402
from sepme.train.objectives.closed_form import shift  # noqa: E402

CONCEPTS = {
    "Vincent van Gogh": "a painting", "Pablo Picasso": "a painting", "Claude Monet": "a painting", "Frida Kahlo": "a painting",
    "Mickey Mouse": "a cartoon animal", "Snoopy": "a dog", "Darth Vader": "a man", "Marilyn Monroe": "a woman", "Elon Musk": "a man",
    "golden retriever": "a dog", "church": "a building", "parachute": "a sky",
}  # fmt: skip
SEEN = ("{}", "a photo of {}", "a picture in the style of {}, highly detailed")
UNSEEN = (
    "{} on a beach at sunset", "an oil painting of {} by a river", "two children look at {}", "black and white portrait, {}, 35mm film",
    "{} in the rain, neon lights, wide angle, a crowded street behind", "postcard with {}",
)  # fmt: skip
TEMPLATE = "the user asks for this picture: {}. now the assistant draws:"


def from_the_left(own: int, anchor: int) -> Tensor:
    """The anchor's last token stands for all further ones: what SepME does."""
    return torch.eye(anchor)[torch.arange(own).clamp_max(anchor - 1)]


def by_share(own: int, anchor: int) -> Tensor:
    """The token at the same share of the length."""
    return torch.eye(anchor)[(torch.arange(own) * (anchor - 1) / max(own - 1, 1)).round().long()]


def from_both_ends(own: int, anchor: int) -> Tensor:
    """The head from the left, the tail from the right; what is left over meets the end of the head."""
    short = min(own, anchor)
    left, right = (short + 1) // 2, short // 2
    middle = torch.full((own - left - right,), max(left - 1, 0))
    return torch.eye(anchor)[torch.cat([torch.arange(left), middle, torch.arange(anchor - right, anchor)])]


def the_mean(own: int, anchor: int) -> Tensor:
    """The mean of the anchor's tokens everywhere."""
    return torch.full((own, anchor), 1 / anchor)


WAYS = (from_the_left, by_share, from_both_ends, the_mean)


def average(rows: Tensor) -> Tensor:
    """Mean of the tokens that there are, normalised: MiniLM's own embedding of a text."""
    return normalize(rows.sum(1) / present(rows).sum(1, keepdim=True), dim=-1)


def nearest(tokens: Tensor, others: Tensor) -> float:
    """Mean distance of tokens ``(n, d_in)`` to the nearest of ``others``."""
    return float(torch.cdist(tokens, others).amin(dim=1).mean())


def planned(encoder: MiniLM, anchored: bool) -> Planner:
    book = ConceptBook(tuple(Concept(n, tuple(t.format(n) for t in SEEN), a if anchored else "") for n, a in CONCEPTS.items()))
    return Planner(encoder, book)


def left_over(planner: Planner, way: object) -> tuple[float, float, float]:
    """Of prompts that were not planned with, behind the gate: the share that still reads as the concept (the nearest of the twelve), and
    what is left of the distance to the anchor, of the text's embedding and of its tokens."""
    encoder = planner.prompts.encoder
    centres = average(encode(encoder, [f"a picture of {n}" for n in CONCEPTS]).context)
    named, texts, tokens = [], [], []
    for i, name in enumerate(CONCEPTS):
        subspace, own = planner.plan(name), planner.prompts.encodings[name].context
        anchor = planner.prompts.anchors[name].context
        words = anchor[0][present(anchor)[0]]
        target = torch.cat([way(int(p.sum()), len(words)) @ words for p in present(own)])  # type: ignore[operator]
        s = shift(own[present(own)], target, subspace.down).float()
        seen = encode(encoder, [t.format(name) for t in UNSEEN]).context
        opened = ratios(seen, subspace.down) > subspace.gate
        edited = torch.where(opened[:, None, None], seen + seen @ subspace.down.T @ s.T, seen)
        goal = average(anchor)
        named += ((average(edited) @ centres.T).argmax(1) == i).float().tolist()
        texts += ((average(edited) - goal).norm(dim=1) / (average(seen) - goal).norm(dim=1)).tolist()
        tokens += [nearest(e[present(seen)[j]], words) / nearest(seen[j][present(seen)[j]], words) for j, e in enumerate(edited)]
    return mean(named), mean(texts), mean(tokens)


def certified(encoder: MiniLM) -> str:
    planner = planned(encoder, True)
    try:
        plans = list(planner.plan_all().values())
    except SepMEError as error:
        return str(error).split(";")[0]
    certificates = [p.certificate for p in plans]
    opened = [
        float((ratios(encode(encoder, [t.format(n) for t in UNSEEN]).context, planner.plan(n).down) > planner.plan(n).gate).float().mean())
        for n in CONCEPTS
    ]
    return (
        f"kept energy {mean(c.kept_energy for c in certificates):.3f}, worst leakage {max(c.worst_leakage for c in certificates):.3f}, "
        f"behind the gate {max(c.worst_leakage_gated for c in certificates):.3f}, unseen prompts over the gate {mean(opened):.3f}, "
        f"ordinary ones {mean(c.false_touch_rate for c in certificates):.4f}"
    )


def main() -> None:
    torch.set_num_threads(1)
    encoder = MiniLM(free_length=True)
    for title, given, anchored in (
        ("anchor: a noun", encoder, True),
        ("anchor: the empty prompt", encoder, False),
        ("a noun, in a template", MiniLM(free_length=True, frame=TEMPLATE), True),
    ):
        planner = planned(given, anchored)
        for way in WAYS:
            named, text, tokens = left_over(planner, way)
            print(f"{title:26} {way.__name__:15} still named {named:.3f}  text {text:.3f}  tokens {tokens:.3f}")
    usual = encoded_book.LOUD
    for sink in (0.0, 100.0, 10000.0):
        for loud in (usual, 1e12):
            encoded_book.LOUD = loud
            how = "left out" if loud == usual else "as any token"
            print(f"first token of norm {sink:.0f}, {how}: {certified(MiniLM(free_length=True, sink=sink))}")
    encoded_book.LOUD = usual
    start = time.perf_counter()
    planned(MiniLM(free_length=True), True).plan("Snoopy")
    print(f"seconds to load MiniLM, read 640 ordinary prompts and plan one of twelve concepts: {time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    main()
