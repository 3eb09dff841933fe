"""Kandinsky 5: a language model's tokens enter blocks that know the timestep; CLIP's vector the modulation."""

from .family import CONTEXT, FLOW, POOLED, Family, Projection, Text

FAMILY = Family(
    "kandinsky5",
    (
        Projection("text_embeddings.in_layer", bias=True),
        Projection("pooled_text_embeddings.in_layer", group=POOLED, bias=True),
    ),
    label="Kandinsky 5",
    texts={CONTEXT: Text("Qwen2.5-VL 7B", (3584,), "as many as the prompt has"), POOLED: Text("CLIP-L", (768,))},
    prediction=FLOW,
    cross_attention=False,
    marks=("text_embeddings.in_layer pooled_text_embeddings.in_layer",),
    kohya="lora_unet_{path}",
)
