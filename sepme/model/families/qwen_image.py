"""Qwen-Image: a language model's tokens, normalised, enter a stream of their own."""

from .family import CONTEXT, FLOW, Family, Projection, Reading, Text

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
FAMILY = Family(
    "qwen-image",
    (Projection("txt_in", bias=True, lora=False),),
    label="Qwen-Image",
    texts={CONTEXT: Text("Qwen2.5-VL 7B", (3584,), "as many as the prompt has", Reading("qwen2", template=TEMPLATE, cut=True))},
    prediction=FLOW,
    cross_attention=False,
    marks=("txt_in txt_norm transformer_blocks.0.attn.add_k_proj",),
    cannot="In Qwen-Image-Edit the text encoder sees the picture too: the gate holds, the certificate does not.",
    kohya="lora_unet_{path}",
)
