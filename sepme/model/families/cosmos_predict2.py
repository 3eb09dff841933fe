"""Anima and Cosmos-Predict2: cross-attention that reads the context itself."""

from .family import CONTEXT, FLOW, Family, Projection, Reading, Text

FAMILY = Family(
    "cosmos-predict2",
    tuple(Projection(f"blocks.*.cross_attn.to_{p}", f"blocks.*.cross_attn.{p}_proj", f"transformer_blocks.*.attn2.to_{p}") for p in "kv"),
    label="Anima, Cosmos-Predict2",
    texts={
        CONTEXT: Text(
            "Qwen3 0.6B through the model's own adapter (Anima), T5 (Cosmos-Predict2)",
            (1024,),
            "512",
            Reading("t5", least=512, hidden=True),
        )
    },
    prediction=FLOW,
    marks=(
        "blocks.0.cross_attn.k_proj blocks.0.adaln_modulation_cross_attn.1",
        "transformer_blocks.0.attn2.to_k transformer_blocks.0.norm2.linear_1 time_embed.t_embedder.linear_1",
    ),
    cannot="Anima's adapter reads the text encoder's tokens before the first step: edit what it returns, not what it is given.",
    sizes={(1024, 56): "cosmos-predict2-2b", (1024, 72): "cosmos-predict2-14b"},
    kohya="lora_unet_{path}",
)
