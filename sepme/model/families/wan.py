"""Wan 2.1 and 2.2: cross-attention over an embedding of umT5's tokens."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Reading, Text

FAMILY = Family(
    "wan",
    (
        Projection("text_embedding.0", diffusers="condition_embedder.text_embedder.linear_1", bias=True),
        Projection("text_embedding.2", diffusers="condition_embedder.text_embedder.linear_2", group=EMBEDDED, bias=True),
        *(
            Projection(f"blocks.*.cross_attn.to_{p}", f"blocks.*.cross_attn.{p}", f"blocks.*.attn2.to_{p}", EMBEDDED, bias=True)
            for p in "kv"
        ),
    ),
    label="Wan 2.x",
    texts={CONTEXT: Text("umT5-XXL", (4096,), "512", Reading("umt5", least=512, hidden=True))},
    prediction=FLOW,
    marks=("text_embedding.0 blocks.0.cross_attn.k", "condition_embedder.text_embedder.linear_1 blocks.0.attn2.to_k"),
    embedding=(("text_embedding",), ("condition_embedder.text_embedder",)),
    sizes={(4096, 60): "wan-30", (4096, 80): "wan-40"},  # blocks: 1.3B and 5B, 14B
    cannot="Image to video: k_img and v_img read the picture, so a concept that it shows stays.",
    kohya="lora_unet_{path}",
)
