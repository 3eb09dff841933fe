"""Stable Diffusion XL: 70 cross-attention layers that read two encoders' channels side by side, 2048."""

from .unet import PROJECTIONS, UNet

FAMILY = UNet(
    "unet",
    PROJECTIONS,
    label="SDXL",
    sizes={(2048, 140): "sdxl"},
    side=128,
    lora_facts={"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
    modelspec="stable-diffusion-xl-v1-base",
)
