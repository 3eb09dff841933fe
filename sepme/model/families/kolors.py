"""Kolors: SDXL's UNet, whose layers read an embedding of ChatGLM's tokens."""

from .family import CONTEXT, EMBEDDED, POOLED, Projection, Text
from .unet import PROJECTIONS, UNet, label_embedding

FAMILY = UNet(
    "kolors",
    (
        Projection("encoder_hid_proj", diffusers="encoder_hid_proj", bias=True),
        *label_embedding(),
        *(Projection(p.site, group=EMBEDDED) for p in PROJECTIONS),
    ),
    label="Kolors",
    texts={CONTEXT: Text("ChatGLM3 6B", (4096,), "256"), POOLED: Text("ChatGLM3 6B, last token", (4096,))},
    marks=("encoder_hid_proj -encoder_hid_proj.image_projection_layers", "text_encoder_hid_proj"),
    embedding=((), ("encoder_hid_proj",)),
    sizes={(4096, 140): "kolors"},
    side=128,
)
