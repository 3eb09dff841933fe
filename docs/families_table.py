"""Writes docs/families.md and its picture from sepme/model/families: ``python docs/families_table.py``. A test compares the page."""

from __future__ import annotations

from pathlib import Path

from sepme.model.families import CONTEXT, EMBEDDED, FAMILIES, POOLED, Family

HEAD = """# Families of models

Where each family reads text, from the data in `sepme/model/families/` (one file each). This page is written by
`python docs/families_table.py`; a test compares it with the data, others compare the data with the real classes of ComfyUI and diffusers.

    prompt ─ text encoder ─ context c ─┬─ c + g(c) s (c D) Sᵀ ──────── every family: an edit of the context, exact
                                       └─ W c + g(c) s Y (c D) ─────── families whose blocks read text alone: an edit of each layer

**each layer**: keys and values of the blocks are made of text alone and are the same in every step, so single layers can be edited exactly
(after an embedding of the text where the table says so: then a delta adds to keys and values what it reads of the context in front of the
embedding, and is no LoRA; of HunyuanDiT it changes what CLIP's tokens say). ComfyUI has these deltas by SepME Train with
the edit layers, in closed form and trained (HunyuanDiT: closed form alone); `sepme train` makes them through diffusers folders of Wan and
PixArt, the library through any pipeline by `TextBlocks` ([a model of your own](own-model.md)).
**context**: text is mixed with the picture behind
the layer that reads it; the context is edited, with the same result for prompts that do not speak of the concept: not one bit differs.
**LoRA**: whether an edit of the context can be written as a change of the weights that read it; it cannot where a norm stands between.
How text encoders that are not CLIP are read: [text encoders](text-encoders.md).

![Families of models: what can be edited in each](images/families.png)

| family | edits | reads the context in (single file; diffusers) | context | other texts | predicts | LoRA |
|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The page."""
    families = sorted((f for f in FAMILIES if f.label), key=lambda f: (not f.cross_attention, f.label))
    rows = [" | ".join(_row(f)) for f in families]
    cannot = [f"- {f.label}: {f.cannot}" for f in families if f.cannot]
    return HEAD + "".join(f"| {row} |\n" for row in rows) + "\n## What an edit cannot do\n\n" + "\n".join(cannot) + "\n"


def _row(f: Family) -> list[str]:
    own = [p for p in f.projections if p.group == CONTEXT]
    layers = [p for p in f.projections if p.keys_or_values and f.cross_attention]
    edits = ("each layer, context" if layers[0].group == CONTEXT else "each layer behind an embedding, context") if layers else "context"
    texts = {
        g: f"{t.encoder}, {' / '.join(map(str, t.widths))}" + (f", tokens: {t.tokens}" if t.tokens else "") for g, t in f.texts.items()
    }
    others = [f"{'pooled vector' if g == POOLED else g}: {text}" for g, text in texts.items() if g != CONTEXT]
    readers = [p for p in f.projections if p.group not in (POOLED, EMBEDDED)]
    lora = "yes" if own and all(p.lora for p in readers) else "no"
    return [
        f.label,
        edits if f.texts else "none",
        "<br>".join(dict.fromkeys(_names(p.template("path"), p.template("diffusers")) for p in own))
        or ("the blocks' keys and values" if layers else "a stack of blocks" if f.texts else "nothing"),
        texts.get(CONTEXT, "none"),
        "<br>".join(others) or "none",
        f.prediction,
        lora,
    ]


def _names(path: str, diffusers: str) -> str:
    return f"`{path}`" if path == diffusers else f"`{path}`; `{diffusers}`"


def picture(path: Path) -> None:
    """The families as a chart: what SepME edits in each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = sorted((f for f in FAMILIES if f.label), key=lambda f: (not f.cross_attention, f.label))
    columns = {
        "edit of\nthe context": lambda f: bool(f.texts),
        "edit of\neach layer": lambda f: bool(f.keys_and_values),
        "pooled vector\nedited too": lambda f: POOLED in f.texts,
        "more texts,\nedited too": lambda f: bool(set(f.texts) - {CONTEXT, POOLED}),
        "as a LoRA": lambda f: _row(f)[-1] == "yes",
    }
    figure, axes = plt.subplots(figsize=(9, 0.27 * len(families) + 1))
    for y, family in enumerate(families):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color="#f2f2f2", zorder=0)
        for x, holds in enumerate(columns.values()):
            if holds(family):
                axes.scatter(x, y, s=70, color="#2c7fb8")
        context = family.texts.get(CONTEXT)
        axes.text(len(columns) - 0.4, y, context.encoder if context else "no text encoder", va="center", fontsize=7)
    axes.set_yticks(range(len(families)), [f.label for f in families], fontsize=8)
    axes.set_xticks(range(len(columns)), list(columns), fontsize=7)
    axes.set(xlim=(-0.5, len(columns) + 4.6), ylim=(len(families) - 0.5, -0.5))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "families.md").write_text(table(), encoding="utf-8")
    picture(here / "images" / "families.png")
