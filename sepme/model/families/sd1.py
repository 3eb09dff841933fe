"""Stable Diffusion 1.x: 16 cross-attention layers that read CLIP's 768 channels."""

from .unet import PROJECTIONS, UNet

FAMILY = UNet(
    "unet",
    PROJECTIONS,
    label="SD1.x",
    sizes={(768, 32): "sd15"},
    side=64,
    lora_facts={"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    modelspec="stable-diffusion-v1",
)
