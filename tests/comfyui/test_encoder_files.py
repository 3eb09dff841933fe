"""Text encoders that are no CLIP, read without ComfyUI from the files that its users have: the same contexts as ComfyUI's own."""

from __future__ import annotations

import os
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from comfyui.environment import comfyui
from comfyui.inside import Inside
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from sepme.hosts.encoders import load_encoders
from sepme.hosts.loading import LoadOptions
from sepme.plan.gate import ordinary_prompts

pytestmark = pytest.mark.xdist_group("comfyui inside")

PROMPTS = ["", "a cat", "a painting of a house by the sea (oil on canvas), 1888"]


class Case(NamedTuple):
    """A family whose prompts are read, ComfyUI's text encoder of it by the name of a tiny one or by its parts, and the tokenizer's folder;
    none: it lies in the file."""

    family: str
    tiny: Any
    tokenizer: str = ""


T5, QWEN = "t5_tokenizer", "qwen25_tokenizer"
OFTEN = ("flux1", "ltxv", "wan", "qwen-image", "lumina2")  # the others where SEPME_COMFYUI names a ComfyUI
CASES = (
    Case("flux1", "flux", T5),
    Case("pixart", "pixart", T5),
    Case("chroma", "pixart", T5),
    Case("ltxv", "ltxv", T5),
    Case("cosmos-predict2", "cosmos_predict2", T5),
    Case("wan", "wan"),
    Case("auraflow", ("aura_t5", "AuraT5Tokenizer", "AuraT5Model", "pile_t5xl", "T5"), "t5_pile_tokenizer"),
    Case("qwen-image", "qwen_image", QWEN),
    Case("omnigen2", ("omnigen2", "Omnigen2Tokenizer", "te", "qwen25_3b", "LLM"), QWEN),
    Case("lumina2", ("lumina2", "LuminaTokenizer", "te", "gemma2_2b", "LLM")),
    Case("z-image", "z_image", QWEN),
    Case("flux2", "flux2", QWEN),
    Case("krea2", "krea2", QWEN),
)


def vocabulary(start: int) -> bytes:
    """A SentencePiece vocabulary with umT5's or Gemma's ids of padding, end and start (-1: none)."""
    words = " ".join(PROMPTS + list(ordinary_prompts()[:60]))
    made = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([words]), model_writer=made, vocab_size=180, pad_id=0, eos_id=1, bos_id=start, unk_id=3, minloglevel=2,
        max_sentence_length=1 << 16,
    )  # fmt: skip
    return made.getvalue()


def written(case: Case, folder: Path) -> tuple[Any, Path]:
    """ComfyUI's CLIP, and its encoder as a file of ComfyUI's layout."""
    tiny = import_module("comfyui.tiny_families")
    if isinstance(case.tiny, str):
        family = tiny.FAMILIES[case.tiny]
        if not tiny.available(case.tiny):
            pytest.skip("This ComfyUI is older than the model")
    else:
        module, tokenizer, encoder, name, size = case.tiny
        family = tiny.Family("", {}, module, tokenizer, encoder, {name: getattr(tiny, size)})
    with torch.inference_mode():
        clip = tiny.clip(family, vocabulary(-1 if case.family == "wan" else 2) if not case.tokenizer else None)
    part = next(name for name in family.sizes if name != "clip_l")
    own = getattr(clip.cond_stage_model, part).transformer.state_dict()
    pictures = [key for key in own if "visual." in key]
    state = {k: v.clone() for k, v in own.items() if k not in pictures[1:]} | {
        k: v for k, v in clip.tokenizer.state_dict().items() if k == "spiece_model"
    }
    save_file(state, folder / "encoder.safetensors")
    return clip, folder / "encoder.safetensors"


def tokenizer(case: Case) -> str | None:
    return str(comfyui() / "comfy" / "text_encoders" / case.tokenizer) if case.tokenizer else None


@pytest.mark.parametrize("case", [pytest.param(c, id=c.family) for c in CASES if c.family in OFTEN or "SEPME_COMFYUI" in os.environ])
def test_prompts_are_read_as_comfyui_reads_them(inside: Inside, case: Case, tmp_path: Path) -> None:
    clip, file = written(case, tmp_path)
    expected = inside.host.text_encoder(clip).encode(PROMPTS)
    found = load_encoders(str(file), LoadOptions(tokenizer=tokenizer(case)), case.family).encode(PROMPTS)
    assert found.context.shape == expected.context.shape
    assert torch.equal(found.mask, expected.mask)
    error = (found.context - expected.context).norm(dim=-1)
    assert error.max() < 1e-4 * expected.context.norm(dim=-1).max()
    assert (expected.context[1] - expected.context[2]).norm(dim=-1).max() > 0.1 * expected.context.norm(dim=-1).max()
