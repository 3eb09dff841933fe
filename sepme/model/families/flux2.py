"""Flux.2: three layers of a language model side by side enter a stream of their own."""

from .family import CONTEXT, FLOW, Family, Projection, Reading, Text

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # klein's
FAMILY = Family(
    "flux2",
    (Projection("txt_in", diffusers="context_embedder"),),
    label="Flux.2",
    texts={
        CONTEXT: Text(
            "three layers of Mistral 3 24B (dev) or Qwen3 4B / 8B (klein) side by side",
            (15360, 7680, 12288),
            "512",
            Reading("qwen3", (9, 18, 27), TEMPLATE, least=512, pad=151643, hidden=True),
        )
    },
    prediction=FLOW,
    cross_attention=False,
    marks=("txt_in double_stream_modulation_img.lin", "context_embedder double_stream_modulation_img.linear"),
    cannot="Reference pictures are not read by the text encoder, so a concept that a reference shows stays.",
    kohya="lora_unet_{path}",
)
