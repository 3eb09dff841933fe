"""Flux.2: three layers of a language model side by side enter a stream of their own."""

from .family import CONTEXT, FLOW, Family, Projection, Text

FAMILY = Family(
    "flux2",
    (Projection("txt_in", diffusers="context_embedder"),),
    label="Flux.2",
    texts={CONTEXT: Text("three layers of Mistral 3 24B (dev) or Qwen3 4B / 8B (klein) side by side", (15360, 7680, 12288), "512")},
    prediction=FLOW,
    cross_attention=False,
    marks=("txt_in double_stream_modulation_img.lin", "context_embedder double_stream_modulation_img.linear"),
    cannot="Reference pictures are not read by the text encoder, so a concept that a reference shows stays.",
    kohya="lora_unet_{path}",
)
