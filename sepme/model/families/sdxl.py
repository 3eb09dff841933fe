"""Stable Diffusion XL: 70 cross-attention layers that read two encoders' channels side by side, 2048."""

from .family import CONTEXT, POOLED, Text
from .unet import PROJECTIONS, UNet, label_embedding

FAMILY = UNet(
    "unet",
    (*PROJECTIONS, *label_embedding()),
    label="SDXL",
    texts={
        CONTEXT: Text("CLIP-L and OpenCLIP-G side by side", (2048,), "77, or chunks of 75"),
        POOLED: Text("OpenCLIP-G", (1280,)),
    },
    sizes={(2048, 140): "sdxl"},
    side=128,
    lora_facts={"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
    modelspec="stable-diffusion-xl-v1-base",
)
