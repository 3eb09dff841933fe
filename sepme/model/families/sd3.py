"""Stable Diffusion 3 and 3.5: CLIP's and T5's tokens one after the other in one stream, CLIP's vectors in the modulation."""

from .family import CONTEXT, EMBEDDED, FLOW, POOLED, Family, Projection, Text

FAMILY = Family(
    "sd3",
    (
        Projection("context_embedder", bias=True),
        Projection("y_embedder.mlp.0", diffusers="time_text_embed.text_embedder.linear_1", group=POOLED, bias=True),
        Projection("y_embedder.mlp.2", diffusers="time_text_embed.text_embedder.linear_2", group=EMBEDDED, bias=True),
    ),
    label="SD3.x",
    texts={
        CONTEXT: Text("CLIP-L and CLIP-G side by side, filled up with zeros, then T5-XXL", (4096,), "77, then 77 or more"),
        POOLED: Text("CLIP-L and CLIP-G side by side", (2048,)),
    },
    prediction=FLOW,
    cross_attention=False,
    marks=(
        "context_embedder joint_blocks.0.context_block.attn.qkv",
        "context_embedder time_text_embed.text_embedder.linear_1 pos_embed.proj transformer_blocks.0.attn.add_k_proj",
    ),
    kohya="lora_unet_{path}",
)
