"""Krea 2: twelve layers of a language model; each token's layers attend to one another, then the tokens."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Reading, Text
from .qwen_image import TEMPLATE

STATES = tuple(range(2, 36, 3))
STACKS = tuple((f"txtfusion.{name}_blocks.*", f"text_fusion.{name}_blocks.*") for name in ("layerwise", "refiner"))
LAYERS = {
    **{f"attn.w{p}": f"attn.to_{p}" for p in "qkv"},
    **{"attn.gate": "attn.to_gate", "attn.wo": "attn.to_out.0"},
    **{f"mlp.{p}": f"ff.{p}" for p in ("gate", "up", "down")},
}
FAMILY = Family(
    "krea2",
    (
        *(Projection(f"{ours}.{p}", diffusers=f"{theirs}.{t}", group=EMBEDDED) for ours, theirs in STACKS for p, t in LAYERS.items()),
        Projection("txtfusion.projector", diffusers="text_fusion.projector", group=EMBEDDED),
        Projection("txtmlp.1", diffusers="txt_in.linear_1", group=EMBEDDED, bias=True),
        Projection("txtmlp.3", diffusers="txt_in.linear_2", group=EMBEDDED, bias=True),
    ),
    label="Krea 2",
    texts={
        CONTEXT: Text(
            "twelve layers of Qwen3-VL 4B side by side",
            (30720,),
            "as many as the prompt has",
            Reading("qwen3_vl", STATES, TEMPLATE, cut=True),
        )
    },
    prediction=FLOW,
    cross_attention=False,
    marks=("txtfusion.projector txtmlp.1", "text_fusion.projector txt_in.linear_1"),
    cannot="No single layer reads the whole context, so there is no LoRA of a context edit.",
    kohya="lora_unet_{path}",
)
