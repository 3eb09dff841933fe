"""Lumina 2: Gemma's tokens are normalised and refined among themselves before they meet the picture's."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Reading, Text

REFINER = "context_refiner.*"
FAMILY = Family(
    "lumina2",
    (
        Projection("cap_embedder.1", diffusers="time_caption_embed.caption_embedder.1", bias=True, lora=False),
        *(
            Projection(f"{REFINER}.attention.to_{p}", f"{REFINER}.attention.qkv", f"{REFINER}.attn.to_{p}", EMBEDDED, fused="qkv")
            for p in "qkv"
        ),
        Projection(f"{REFINER}.attention.out", diffusers=f"{REFINER}.attn.to_out.0", group=EMBEDDED),
        *(Projection(f"{REFINER}.feed_forward.w{i}", diffusers=f"{REFINER}.feed_forward.linear_{i}", group=EMBEDDED) for i in (1, 3, 2)),
    ),
    label="Lumina 2",
    texts={CONTEXT: Text("Gemma 2 2B", (2304,), "as many as the prompt has", Reading("gemma2", (-2,)))},
    prediction=FLOW,
    cross_attention=False,
    marks=(
        "cap_embedder.1 noise_refiner.0.attention.qkv -cap_pad_token -clip_text_pooled_proj.0",
        "time_caption_embed.caption_embedder.1 noise_refiner.0.attn.to_q -ref_image_patch_embedder",
    ),
    kohya="lora_unet_{path}",
)
