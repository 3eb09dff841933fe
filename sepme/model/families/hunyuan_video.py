"""HunyuanVideo: a language model's tokens and their mean enter a refiner that knows the timestep; CLIP's vector the modulation."""

from .family import CONTEXT, EMBEDDED, FLOW, POOLED, Family, Projection, Text

MEAN, THEIR_MEAN = "txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder"
FIRST = "txt_in.individual_token_refiner.blocks.0.self_attn"
THEIR_FIRST = "context_embedder.token_refiner.refiner_blocks.0.attn"

FAMILY = Family(
    "hunyuan-video",
    (
        Projection("txt_in.input_embedder", diffusers="context_embedder.proj_in", bias=True),
        Projection(f"{MEAN}.in_layer", diffusers=f"{THEIR_MEAN}.linear_1", bias=True),
        Projection(f"{MEAN}.out_layer", diffusers=f"{THEIR_MEAN}.linear_2", group=EMBEDDED, bias=True),
        *(Projection(f"{FIRST}.to_{p}", f"{FIRST}.qkv", f"{THEIR_FIRST}.to_{p}", EMBEDDED, bias=True, fused="qkv") for p in "qkv"),
        Projection(f"{FIRST}.proj", diffusers=f"{THEIR_FIRST}.to_out.0", group=EMBEDDED, bias=True),
        Projection("vector_in.in_layer", diffusers="time_text_embed.text_embedder.linear_1", group=POOLED, bias=True),
        Projection("vector_in.out_layer", diffusers="time_text_embed.text_embedder.linear_2", group=EMBEDDED, bias=True),
    ),
    label="HunyuanVideo",
    texts={CONTEXT: Text("Llama 3 8B", (4096,), "as many as the prompt has, up to 256"), POOLED: Text("CLIP-L", (768,))},
    prediction=FLOW,
    cross_attention=False,
    marks=(
        "txt_in.input_embedder txt_in.individual_token_refiner.blocks.0.norm1 -byt5_in.fc1",
        "context_embedder.proj_in context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
    ),
    cannot="Image to video: Llama sees the picture too, so the gate holds, the certificate does not.",
    kohya="lora_unet_{path}",
)
