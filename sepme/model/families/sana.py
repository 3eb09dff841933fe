"""Sana: cross-attention over a normalised embedding of Gemma's tokens."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Text

FAMILY = Family(
    "sana",
    (
        Projection("caption_projection.linear_1", bias=True),
        Projection("caption_projection.linear_2", group=EMBEDDED, bias=True),
        *(Projection(f"transformer_blocks.*.attn2.to_{p}", group=EMBEDDED, bias=True) for p in "kv"),
    ),
    label="Sana",
    texts={CONTEXT: Text("Gemma 2 2B", (2304,), "300")},
    prediction=FLOW,
    marks=("caption_norm caption_projection.linear_1 patch_embed.proj time_embed.linear",),
    embedding=((), ("caption_projection", "caption_norm")),
    sizes={(2304, 56): "sana-0.6b", (2304, 40): "sana-1.6b"},
    kohya="lora_unet_{path}",
)
