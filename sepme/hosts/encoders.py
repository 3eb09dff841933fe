"""Text encoders without a model: the folders ``text_encoder`` and ``tokenizer`` of a Stable Diffusion 1.x, 2.x or XL folder alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import SepMEError, out_of_memory
from ..files import check_file_precision, first_line, refuse_pickle
from .loading import LoadOptions
from .pipeline import PipelineEncoder

PAIRS = (("text_encoder", "tokenizer", CLIPTextModel), ("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection))


def encoders_alone(folder: Path) -> bool:
    """Whether a folder holds text encoders and no denoiser."""
    return (folder / PAIRS[0][0]).is_dir() and not (folder / "unet").exists() and not (folder / "transformer").exists()


def load_encoders(model: str, options: LoadOptions) -> PipelineEncoder:
    """The text encoders of such a folder (:func:`encoders_alone`), of safetensors only.

    Raises:
        SepMEError: files are missing or damaged, or an encoder is no CLIP.
    """
    parts: dict[str, Any] = {"_execution_device": torch.device(options.device)}
    for encoder, tokenizer, kind in PAIRS:
        folder = Path(model) / encoder
        if not folder.is_dir():
            continue
        refuse_pickle(folder)
        for file in folder.glob("*.safetensors"):
            check_file_precision(file)
        try:
            read = partial(kind.from_pretrained, use_safetensors=True, local_files_only=True)
            parts[encoder] = read(folder).to(options.device, options.dtype).eval().requires_grad_(False)
            parts[tokenizer] = CLIPTokenizer.from_pretrained(Path(model) / tokenizer, local_files_only=True)
        except Exception as error:  # whatever a broken folder makes the loaders raise
            if out_of_memory(error):
                raise
            raise SepMEError(
                f"{folder} cannot be loaded ({type(error).__name__}: {first_line(error)}); it must hold CLIP as .safetensors, with its "
                f"{tokenizer} beside it."
            ) from None
        if parts[encoder].config.model_type != "clip_text_model":
            raise SepMEError(f"{folder} holds a {parts[encoder].config.model_type}; only CLIP's text encoders can be read without a model.")
    return PipelineEncoder(SimpleNamespace(**parts))
