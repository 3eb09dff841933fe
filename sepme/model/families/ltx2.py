"""LTX-2 and later: keys and values are modulated by the timestep, behind an embedding of Gemma's tokens."""

from .family import CONTEXT, EMBEDDED, FLOW, Family, Projection, Text

FAMILY = Family(
    "ltx2",
    (
        Projection("caption_projection.linear_1", bias=True),
        Projection("caption_projection.linear_2", group=EMBEDDED, bias=True),
    ),
    label="LTX-2",
    texts={CONTEXT: Text("Gemma 3 12B", (3840,), "as many as the prompt has")},
    prediction=FLOW,
    cross_attention=False,
    marks=("audio_adaln_single.linear", "prompt_adaln_single.linear", "audio_proj_in proj_in transformer_blocks.0.attn2.to_k"),
    cannot="The sound has connectors to the text of its own, which are not part of this table: the sound of a concept may stay.",
    kohya="lora_unet_{path}",
)
