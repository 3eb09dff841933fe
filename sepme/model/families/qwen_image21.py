"""Qwen-Image 2.1: text stands in one causal sequence in front of the picture, and is normalised where it enters."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Text

FAMILY = Family(
    "qwen-image21",
    (Projection("txt_in.in_layer", lora=False), Projection("txt_in.out_layer", group=EMBEDDED)),
    label="Qwen-Image 2.1",
    texts={CONTEXT: Text("Qwen3-VL 8B", (4096,), "as many as the prompt has")},
    prediction=FLOW,
    cross_attention=False,
    marks=("txt_in.in_layer modulation.1 transformer_blocks.0.img_mlp.gate_layer",),
    cannot="The model keeps keys and values of the text across steps: edit the context before the first, a patch of a layer can come late.",
    kohya="lora_unet_{path}",
)
