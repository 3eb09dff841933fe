"""Z-Image: a language model's tokens are normalised and refined among themselves before they meet the picture's."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Reading, Text

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
REFINER = "context_refiner.*"
FAMILY = Family(
    "z-image",
    (
        Projection("cap_embedder.1", bias=True, lora=False),
        *(
            Projection(f"{REFINER}.attention.to_{p}", f"{REFINER}.attention.qkv", f"{REFINER}.attention.to_{p}", EMBEDDED, fused="qkv")
            for p in "qkv"
        ),
        Projection(f"{REFINER}.attention.out", diffusers=f"{REFINER}.attention.to_out.0", group=EMBEDDED),
        *(Projection(f"{REFINER}.feed_forward.w{i}", group=EMBEDDED) for i in (1, 3, 2)),
    ),
    label="Z-Image",
    texts={CONTEXT: Text("Qwen3 4B", (2560,), "as many as the prompt has", Reading("qwen3", (-2,), TEMPLATE))},
    prediction=FLOW,
    cross_attention=False,
    marks=("cap_embedder.1 cap_pad_token",),
    cannot="In Z-Image-Omni the pictures have an encoder of their own, so a concept that a reference shows stays.",
    kohya="lora_unet_{path}",
)
