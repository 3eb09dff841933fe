"""Stable Diffusion 2.x: 16 cross-attention layers that read OpenCLIP's 1024 channels."""

from .unet import PROJECTIONS, UNet

FAMILY = UNet(
    "unet",
    PROJECTIONS,
    label="SD2.x",
    sizes={(1024, 32): "sd21"},
    side=64,
    lora_facts={"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    modelspec="stable-diffusion-v2-768-v",
)
