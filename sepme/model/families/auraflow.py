"""AuraFlow: the tokens of Pile-T5 enter a stream of their own, behind learnt ones."""

from .family import CONTEXT, FLOW, Family, Projection, Reading, Text

FAMILY = Family(
    "auraflow",
    (Projection("cond_seq_linear", diffusers="context_embedder"),),
    label="AuraFlow",
    texts={CONTEXT: Text("Pile-T5-XL", (2048,), "256 or more", Reading("umt5", least=256, pad=1, hidden=True))},
    prediction=FLOW,
    cross_attention=False,
    marks=("cond_seq_linear double_layers.0.attn.w1q", "context_embedder joint_transformer_blocks.0.attn.to_q"),
    kohya="lora_unet_{path}",
)
