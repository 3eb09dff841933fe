"""OmniGen2: a language model's tokens are normalised and refined among themselves before they meet the pictures'."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Reading, Text

TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
)
FAMILY = Family(
    "omnigen2",
    (
        Projection("time_caption_embed.caption_embedder.1", bias=True, lora=False),
        *(Projection(f"context_refiner.*.attn.to_{p}", group=EMBEDDED) for p in ("q", "k", "v", "out.0")),
        *(Projection(f"context_refiner.*.feed_forward.linear_{i}", group=EMBEDDED) for i in (1, 3, 2)),
    ),
    label="OmniGen2",
    texts={CONTEXT: Text("Qwen2.5-VL 3B", (2048,), "as many as the prompt has", Reading("qwen2", template=TEMPLATE))},
    prediction=FLOW,
    cross_attention=False,
    marks=("time_caption_embed.caption_embedder.1 ref_image_patch_embedder",),
    cannot="Reference pictures are not read by the text encoder, so a concept that a reference shows stays.",
    kohya="lora_unet_{path}",
)
