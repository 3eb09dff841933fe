"""LTX-Video 0.9: cross-attention over an embedding of T5's tokens."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Reading, Text

FAMILY = Family(
    "ltxv",
    (
        Projection("caption_projection.linear_1", bias=True),
        Projection("caption_projection.linear_2", group=EMBEDDED, bias=True),
        *(Projection(f"transformer_blocks.*.attn2.to_{p}", group=EMBEDDED, bias=True) for p in "kv"),
    ),
    label="LTX-Video 0.9",
    texts={CONTEXT: Text("T5-XXL", (4096,), "128 or more", Reading("t5", least=128, hidden=True))},
    prediction=FLOW,
    marks=(
        "caption_projection.linear_1 patchify_proj adaln_single.linear -audio_adaln_single.linear -prompt_adaln_single.linear",
        "caption_projection.linear_1 proj_in time_embed.linear transformer_blocks.0.attn2.to_k -audio_proj_in",
    ),
    embedding=(("caption_projection",), ("caption_projection",)),
    sizes={(4096, 56): "ltxv-2b", (4096, 96): "ltxv-13b"},
    kohya="lora_unet_{path}",
)
