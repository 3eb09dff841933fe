"""Flux.1: T5's tokens enter a stream of their own, CLIP's vector the modulation."""

from .family import CONTEXT, EMBEDDED, FLOW, POOLED, Family, Projection, Reading, Text

FAMILY = Family(
    "flux1",
    (
        Projection("txt_in", diffusers="context_embedder", bias=True),
        Projection("vector_in.in_layer", diffusers="time_text_embed.text_embedder.linear_1", group=POOLED, bias=True),
        Projection("vector_in.out_layer", diffusers="time_text_embed.text_embedder.linear_2", group=EMBEDDED, bias=True),
    ),
    label="Flux.1",
    texts={CONTEXT: Text("T5-XXL", (4096,), "256 or more", Reading("t5", least=256)), POOLED: Text("CLIP-L", (768,))},
    prediction=FLOW,
    cross_attention=False,
    marks=(
        "txt_in vector_in.in_layer double_blocks.0.img_mod.lin",
        "context_embedder time_text_embed.text_embedder.linear_1 single_transformer_blocks.0.norm.linear",
    ),
    cannot="Kontext's reference pictures are not read by the text encoder, so a concept that a reference shows stays.",
    kohya="lora_unet_{path}",
)
