"""Stable Diffusion 2.x: 16 cross-attention layers that read OpenCLIP's 1024 channels."""

from .family import CONTEXT, Text, V
from .unet import PROJECTIONS, UNet

FAMILY = UNet(
    "unet",
    PROJECTIONS,
    label="SD2.x",
    texts={CONTEXT: Text("OpenCLIP-H", (1024,), "77, or chunks of 75")},
    prediction=V,
    sizes={(1024, 32): "sd21"},
    side=64,
    lora_facts={"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    modelspec="stable-diffusion-v2-768-v",
)
