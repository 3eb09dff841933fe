"""PixArt-alpha and -Sigma: cross-attention over an embedding of T5's tokens, the prompts of a batch in one row."""

from .family import CONTEXT, EMBEDDED, Family, Projection, Reading, Text

LAYER = "blocks.*.cross_attn"
FAMILY = Family(
    "pixart",
    (
        Projection("y_embedder.y_proj.fc1", diffusers="caption_projection.linear_1", bias=True),
        Projection("y_embedder.y_proj.fc2", diffusers="caption_projection.linear_2", group=EMBEDDED, bias=True),
        *(
            Projection(f"{LAYER}.to_{p}", f"{LAYER}.kv_linear", f"transformer_blocks.*.attn2.to_{p}", EMBEDDED, bias=True, fused="kv")
            for p in "kv"
        ),
    ),
    label="PixArt",
    texts={CONTEXT: Text("T5-XXL", (4096,), "as many as the prompt has, up to 120 or 300", Reading("t5"))},
    marks=(
        "y_embedder.y_proj.fc1 blocks.0.cross_attn.kv_linear",
        "caption_projection.linear_1 adaln_single.linear pos_embed.proj transformer_blocks.0.attn2.to_k",
    ),
    embedding=(("y_embedder.y_proj",), ("caption_projection",)),
    sizes={(4096, 56): "pixart"},
    kohya="lora_unet_{path}",
)
