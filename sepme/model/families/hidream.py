"""HiDream-I1: T5's tokens and 48 layers of Llama's, each with a projection of its own, and a pooled vector."""

from .family import CONTEXT, EMBEDDED, FLOW, POOLED, Family, Projection, Text

FAMILY = Family(
    "hidream",
    (
        Projection("caption_projection.48.linear"),  # the last, behind one for each of 16 double and 32 single blocks
        Projection("caption_projection.*.linear", group="llama"),
        Projection("p_embedder.pooled_embedder.linear_1", group=POOLED, bias=True),
        Projection("p_embedder.pooled_embedder.linear_2", group=EMBEDDED, bias=True),
    ),
    label="HiDream-I1",
    texts={
        CONTEXT: Text("T5-XXL", (4096,), "128 or more"),
        "llama": Text("Llama 3.1 8B, one layer for each block", (4096,), "128 or more in every layer"),
        POOLED: Text("CLIP-L and CLIP-G side by side", (2048,)),
    },
    prediction=FLOW,
    cross_attention=False,
    marks=("caption_projection.0.linear p_embedder.pooled_embedder.linear_1",),
    cannot="Every layer of Llama gets an edit of its own, so making one takes as often as long as the encoder has layers.",
    kohya="lora_unet_{path}",
)
