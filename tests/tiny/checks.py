"""What must hold for every family's real class: its table, and that an edit of the context is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from sepme.apply.composition import Composition
from sepme.apply.projector import KVProjector
from sepme.concepts import Concept
from sepme.delta.concept_delta import ConceptDelta
from sepme.model.blocks import TextBlocks
from sepme.model.families import CONTEXT, EMBEDDED, FAMILIES, POOLED, Family, recognise
from sepme.model.patch import Forward, patched
from sepme.train.objectives.closed_form import solve

from .probe import ROWS, Texts, Tiny, seen, text_projections

RANK, GATE = 2, 0.99
NAMED = {f.kind.replace("-", "_"): f for f in FAMILIES if f.kind != "unet"}
LAYERED = {name for name, family in NAMED.items() if family.keys_and_values and family.marks}  # no UNets, whose layers hosts know
NEVER_CALLED = {f"time_extra_emb.pooler.{p}_proj" for p in "qkvc"}  # diffusers hands their weights to one function
ROUNDS = {"kandinsky5"}  # diffusers' rotary embedding there ends in bfloat16: what reads the text is compared, not the prediction behind it


def family_named(name: str) -> Family:
    """The family of a tiny model; UNets have unpublished widths here, so theirs by the file's name."""
    from importlib import import_module

    return NAMED.get(name) or import_module(f"sepme.model.families.{name}").FAMILY


def check_table(name: str, tiny: Tiny, naming: str) -> None:
    """The table's projections are exactly the linear layers that see text alone in every step, with their groups and biases."""
    family, found, modules = family_named(name), text_projections(tiny), dict(tiny.model.named_modules())
    texts = tiny.draw(ROWS, 10)
    given = seen(tiny, texts)
    tables = {group: family.find(modules, group) for group in {p.group for p in family.projections}}
    named = {path for table in tables.values() for path in table.values()} - (NEVER_CALLED if naming == "diffusers" else set())
    assert named == set(found), f"{name}: only in the table {named - set(found)}, only in the model {set(found) - named}"
    for group, table in tables.items():
        for site, path in table.items():
            if path not in found:
                continue
            (p,) = [p for p in family.projections if p.numbers("site", site) is not None][:1]
            assert p.bias is (modules[path].bias is not None), path
            raw = any(_shares(given[path][0], texts[g]) for g in texts)
            if group == EMBEDDED:
                assert not raw, f"{path} reads a text as it is given"
            else:
                assert found[path] == {group}, path
    # the texts that the model is given are those of the table, and something reads each of them
    assert set(tiny.texts) == set(family.texts) == set().union(*found.values())
    assert family.cross_attention is any(_keys_of_blocks(path) for path in found)
    assert (TextBlocks.of(tiny.model) is not None) is (name in LAYERED)


def _keys_of_blocks(path: str) -> bool:
    """Whether a module is named as the keys, or keys and values, of a block's attention over text."""
    return "blocks." in path and any(part in path for part in ("attn2.", "cross_attn."))


def _shares(read: Tensor, text: Tensor) -> bool:
    """Whether a layer reads a text as it was given, token for token (with other numbers behind it, for pooled vectors)."""
    tokens, given = read.flatten(0, -2), text.flatten(0, -2)
    return len(tokens) == len(given) and torch.equal(tokens[:, : given.shape[1]].float(), given.float())


def check_recognised(name: str, tiny: Tiny) -> None:
    """A state dict, with and without the prefix of whole checkpoints, is recognised as this family and no other."""
    shapes = {n: tuple(p.shape) for n, p in tiny.model.named_parameters()}
    for prefix in ("", "model.diffusion_model."):
        found = recognise({prefix + n: shape for n, shape in shapes.items()})
        assert found is not None
        assert found is NAMED.get(name, FAMILIES[-1]), f"{name} is recognised as {found.kind}"
    bare = {n.removesuffix(".weight") for n in shapes}
    assert [f.kind for f in FAMILIES if f.marked(bare)] == ([NAMED[name].kind] if name in NAMED else [])


def edited(tiny: Tiny, texts: Texts, strengths: Tensor, gate: bool = True) -> tuple[dict[str, Tensor], dict[str, ConceptDelta]]:
    """The texts with two context edits' strengths ``(rows, 2)``, each group but the pooled vector, and the first edit of each group.

    The first concept lies in the tokens of the prompts 0 and 2, the second in those of 1 and 2; the gates tell them apart.
    """
    result, firsts = dict(texts), {}
    for group, text in texts.items():
        if group == POOLED:
            continue
        tokens = text.flatten(1, -2)
        deltas = tuple(_delta(f"{group} {i}", tokens[i]) for i in range(2))
        tokens[2] = torch.cat([tokens[0][:1], tokens[1][1:2], tokens[2][2:]])
        result[group] = Composition(deltas).edit_context(tokens, strengths, gate).reshape(text.shape)
        firsts[group] = deltas[0]
    return result, firsts


def _delta(name: str, tokens: Tensor) -> ConceptDelta:
    """A context edit along the prompt's first tokens, and to somewhere else."""
    down = torch.linalg.qr(tokens[:RANK].double().T).Q.T.float()
    generator = torch.Generator().manual_seed(len(name))
    shift = torch.randn(tokens.shape[-1], RANK, generator=generator)
    return ConceptDelta.from_factors(Concept(name), down, {CONTEXT: shift}, GATE, {})


def check_exact(tiny: Tiny) -> None:
    """In one batch: erased rows move, spared rows and restored ones are stock's to the bit, and each as if it were alone."""
    texts = tiny.draw(4, 30)
    on = torch.ones(4, 2)
    erased, _ = edited(tiny, texts, on)  # also puts both concepts into prompt 2
    stock = tiny.predict(texts)
    assert stock.isfinite().all()
    out = tiny.predict(erased)
    moved = [i for i in range(4) if not torch.equal(out[i], stock[i])]
    assert moved == [0, 1, 2]
    assert torch.equal(out[3], stock[3])  # speaks of neither: no edit
    # restored: everything off is the same tensor
    off, _ = edited(tiny, texts, 0 * on)
    assert all(off[g].data_ptr() == texts[g].data_ptr() for g in texts)
    # mixed toggles: row 0 restored, row 1 erased, row 2 of its two concepts one restored
    mixed, _ = edited(tiny, texts, torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    part = tiny.predict(mixed)
    assert torch.equal(part[0], stock[0])
    assert torch.equal(part[1], out[1])
    assert torch.equal(part[3], stock[3])
    assert not torch.equal(part[2], stock[2])
    assert not torch.equal(part[2], out[2])


def check_layers(name: str, tiny: Tiny) -> None:
    """Deltas of every single layer, in one batch: erased rows move, spared and restored ones are stock's to the bit, and a row with both
    concepts is erased as its toggles say; keys and values of the next step are not made again."""
    blocks = TextBlocks.of(tiny.model)
    assert blocks is not None
    assert blocks.family is family_named(name)
    texts = tiny.draw(4, 30)
    tokens = texts[CONTEXT]
    concepts = [tokens[i].clone() for i in range(2)]
    tokens[2] = torch.cat([tokens[0][:1], tokens[1][1:2], tokens[2][2:]])
    deltas = []
    for i, own in enumerate(concepts):
        down = torch.linalg.qr(own[:RANK].double().T).Q.T.float()
        up = solve(blocks.weights(), own[:RANK], concepts[1 - i][:RANK], down, read=blocks.embed if blocks.embedding else None)
        deltas.append(ConceptDelta.from_factors(Concept(f"concept {i}"), down, up, GATE, {}))
    calls: list[str] = []
    projector = KVProjector(blocks, Composition(tuple(deltas)))
    stock, on = tiny.predict(texts), torch.ones(4, 2)

    def counting(path: str, module: nn.Module, forward: Forward) -> Forward:
        return lambda read: (calls.append(path), forward(read))[1]

    def erased(strengths: Tensor) -> Tensor:
        calls.clear()
        with patched(blocks.modules, counting), projector.attached(strengths, tokens):
            first = tiny.predict(texts)
            again = tiny.predict(texts)
        assert sorted(calls) == sorted(blocks.modules)
        assert torch.equal(first, again)
        return first

    out = erased(on)
    assert [i for i in range(4) if not torch.equal(out[i], stock[i])] == [0, 1, 2]
    assert torch.equal(erased(0 * on), stock)
    part = erased(torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(part[0], stock[0])
    assert torch.equal(part[1], out[1])
    assert torch.equal(part[3], stock[3])
    assert not torch.equal(part[2], stock[2])
    assert not torch.equal(part[2], out[2])
    assert torch.equal(tiny.predict(texts), stock)  # nothing is left behind


def check_lora(name: str, tiny: Tiny) -> None:
    """``W + s W S Dᵀ`` on the layers that read a text is the edit of that text to 1e-6, unless a norm stands between or none reads it."""
    family, modules = family_named(name), dict(tiny.model.named_modules())
    texts = tiny.draw(ROWS + 1, 30)
    strengths = torch.tensor([0.7, 0.0])
    change, firsts = edited(tiny, texts, strengths, gate=False)
    for group, delta in firsts.items():
        readers = {p.site: p for p in family.projections if p.group == group}
        paths = dict.fromkeys(family.find(modules, group).values(), readers)
        if not paths:
            assert family.kind in ("krea2", "hunyuan-dit"), f"nothing reads {group}"
            continue
        outcome = partial(read, tiny, [modules[p] for p in paths]) if name in ROUNDS else tiny.predict
        expected = outcome({**texts, group: change[group]})
        with merged([modules[path] for path in paths], 0.7 * delta.up_factor(CONTEXT) @ delta.down):
            found = outcome(texts)
        error = float((found - expected).abs().max() / expected.abs().max())
        effect = float((expected - outcome(texts)).abs().max() / expected.abs().max())
        assert effect > 1e-3
        if not all(p.lora for p in readers.values()):
            assert error > 1e-2 * effect, "nothing stands between"
        else:
            assert error < 1e-6


def read(tiny: Tiny, layers: list[nn.Module], texts: Texts) -> Tensor:
    """What the layers make of the texts, flat and side by side."""
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, given, out: outputs.append(out.flatten())) for layer in layers]
    try:
        tiny.predict(texts)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(outputs)


@contextmanager
def merged(layers: list[nn.Module], change: Tensor) -> Iterator[None]:
    """The layers with ``W + W S Dᵀ``, for ``S Dᵀ`` ``(d_in, d_in)``."""
    before = [layer.weight for layer in layers]
    try:
        for layer in layers:
            weight = layer.weight.double()
            layer.weight = nn.Parameter((weight + weight @ change.double()).to(layer.weight.dtype), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight
