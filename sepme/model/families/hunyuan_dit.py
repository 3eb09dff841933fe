"""HunyuanDiT: cross-attention over CLIP's tokens and an embedding of mT5's; a vector of mT5's in the modulation."""

from .family import CONTEXT, EMBEDDED, Family, Projection, Text, V

LAYER = "blocks.*.attn2"
FAMILY = Family(
    "hunyuan-dit",
    (
        Projection("mlp_t5.0", diffusers="text_embedder.linear_1", group="t5", bias=True, lora=False),
        Projection("mlp_t5.2", diffusers="text_embedder.linear_2", group=EMBEDDED, bias=True),
        *(
            Projection(f"pooler.{p}_proj", diffusers=f"time_extra_emb.pooler.{p}_proj", group=EMBEDDED, bias=True)
            for p in ("q", "k", "v", "c")
        ),
        Projection("extra_embedder.0", diffusers="time_extra_emb.extra_embedder.linear_1", group=EMBEDDED, bias=True),
        Projection("extra_embedder.2", diffusers="time_extra_emb.extra_embedder.linear_2", group=EMBEDDED, bias=True),
        *(Projection(f"{LAYER}.to_{p}", f"{LAYER}.kv_proj", f"{LAYER}.to_{p}", EMBEDDED, bias=True, fused="kv") for p in "kv"),
    ),
    label="HunyuanDiT",
    texts={
        CONTEXT: Text("a bilingual CLIP", (1024,), "77"),
        "t5": Text("mT5-XL", (2048,), "256"),
    },
    prediction=V,
    marks=("mlp_t5.0 blocks.0.attn2.kv_proj", "text_embedder.linear_1 text_embedding_padding blocks.0.attn2.to_k"),
    sizes={(1024, 80): "hunyuan-dit"},
    cannot="Layers: mT5's tokens are left as they are, and they say much; edit the context, and mT5's text is edited with it.",
    kohya="lora_unet_{path}",
)
