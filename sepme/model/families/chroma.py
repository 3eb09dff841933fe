"""Chroma: Flux.1 without the pooled vector; the modulation comes from the timestep alone."""

from .family import CONTEXT, FLOW, Family, Projection, Reading, Text

FAMILY = Family(
    "chroma",
    (Projection("txt_in", diffusers="context_embedder", bias=True),),
    label="Chroma",
    texts={CONTEXT: Text("T5-XXL", (4096,), "as many as the prompt has", Reading("t5"))},
    prediction=FLOW,
    cross_attention=False,
    marks=("txt_in distilled_guidance_layer.in_proj", "context_embedder distilled_guidance_layer.in_proj"),
    kohya="lora_unet_{path}",
)
