"""Stable Diffusion 1.x: 16 cross-attention layers that read CLIP's 768 channels."""

from .family import CONTEXT, Text
from .unet import PROJECTIONS, UNet

FAMILY = UNet(
    "unet",
    PROJECTIONS,
    label="SD1.x",
    texts={CONTEXT: Text("CLIP-L", (768,), "77, or chunks of 75")},
    sizes={(768, 32): "sd15"},
    side=64,
    lora_facts={"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    modelspec="stable-diffusion-v1",
)
