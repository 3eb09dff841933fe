"""Stable Diffusion 3 in diffusers with all of its texts: CLIP's tokens, T5's behind them, and the vectors of both CLIPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny.probe import seeded
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from sepme.apply.composition import Composition
from sepme.concepts import Concept, ConceptBook
from sepme.hosts.diffusers import DEMO
from sepme.model.protocols import Encoding
from sepme.plan.directions import PlanOptions
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta

CLIP, WIDTH, TOKENS = 32, 96, 16  # channels of each CLIP and of T5; T5's tokens


@pytest.fixture(scope="module")
def pipe() -> Any:
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    words = len(tokenizer)
    sizes = {"vocab_size": words, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPTextConfig(hidden_size=CLIP, projection_dim=CLIP, eos_token_id=tokenizer.eos_token_id, bos_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clips = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
        t5 = T5EncoderModel(T5Config(vocab_size=words, d_model=WIDTH, d_ff=64, d_kv=16, num_heads=2, num_layers=2)).eval()
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=1, sample_size=8, shift_factor=0.1)
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * CLIP, pos_embed_max_size=8,
    )  # fmt: skip
    made = StableDiffusion3Pipeline(
        transformer=seeded(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=clips[0],
        text_encoder_2=clips[1], text_encoder_3=t5, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


class Reader:
    """The pipeline's own texts of a prompt."""

    free_length = True

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def encode(self, prompts: Sequence[str]) -> Encoding:
        asked = {"do_classifier_free_guidance": False, "max_sequence_length": TOKENS}
        with torch.no_grad():
            context, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, None, **asked)
        return Encoding(context, torch.ones(context.shape[:2], dtype=torch.bool), pooled)


def test_erased_spared_restored(pipe: Any) -> None:
    """One edit reaches CLIP's tokens and T5's; what does not speak of the concept keeps its bits, and so does the concept restored."""
    reader = Reader(pipe)
    book = ConceptBook(
        (Concept("star", ("star", "a star", "a picture of a star")), Concept("tulip", ("tulip", "a tulip"))), ("a red church",)
    )
    planner = Planner(reader, book, PlanOptions(tolerance=0.05), ("a blue mushroom", "an airplane", "a red mushroom", "green"))
    delta = make_delta(planner, "star", None, TrainOptions(objective="closed-form", edit="context"))
    prompts = ["a star", "a red church", "a tulip", "a star"]
    encoding, composition = reader.encode(prompts), Composition((delta,))
    clip = encoding.context.shape[1] - TOKENS
    assert encoding.context.shape == (4, clip + TOKENS, WIDTH)
    assert not encoding.context[:, :clip, 2 * CLIP :].any()  # CLIP's are filled up with zeros
    assert encoding.pooled is not None
    strengths = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    context = composition.edit_context(encoding.context, strengths)
    pooled = composition.replace_pooled(encoding.pooled, encoding.context, strengths)
    moved = (context - encoding.context)[0].norm(dim=-1)
    assert moved[:clip].max() > 0
    assert moved[clip:].max() > 0
    assert not torch.equal(pooled[0], encoding.pooled[0])

    def latents(context: Tensor, pooled: Tensor) -> Tensor:
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
        more = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 8, "width": 8, "output_type": "latent"}
        out: Tensor = pipe(prompt_embeds=context, pooled_prompt_embeds=pooled, latents=start, **more).images
        return out

    stock, erased = latents(encoding.context, encoding.pooled), latents(context, pooled)
    assert stock.isfinite().all()
    assert [i for i in range(4) if not torch.equal(erased[i], stock[i])] == [0]
    assert (erased[0] - stock[0]).abs().max() > 0.05 * (stock[1] - stock[0]).abs().max()
