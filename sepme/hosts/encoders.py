"""Text encoders without a denoiser: folders of them in diffusers' layout, folders in the transformers layout, single files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import SepMEError, out_of_memory
from ..files import check_file_precision, first_line, refuse_pickle
from ..model.families import CONTEXT, FAMILIES, POOLED, Family, recognise
from .encoder_files import EncoderFiles
from .language import FamilyEncoder, Tokenizer
from .loading import PIPELINES, LoadOptions
from .pipeline import PipelineEncoder

PAIRS = (("text_encoder", "tokenizer", CLIPTextModel), ("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection))
LANGUAGE = tuple((f"text_encoder{end}", f"tokenizer{end}") for end in ("", "_2", "_3"))
READ = {f.kind: f for f in FAMILIES if CONTEXT in f.texts and f.texts[CONTEXT].reading is not None}


def holds_encoders(path: Path) -> bool:
    """Whether text encoders can be read of a file or folder that holds no Stable Diffusion; see :func:`load_encoders`."""
    if path.is_dir() and pipeline_class(path) in PIPELINES:
        return False
    clip_alone = (path / PAIRS[0][0]).is_dir() and not (path / "unet").exists() and not (path / "transformer").exists()
    return clip_alone or _language(path) is not None


def load_encoders(model: str, options: LoadOptions, family: str | None = None) -> PipelineEncoder | FamilyEncoder:
    """The text encoders that are at a path (:func:`holds_encoders`), of safetensors only.

    Args:
        family: a key of :data:`READ`; found out if only one family reads such an encoder.

    Raises:
        SepMEError: files are missing or damaged, no tokenizer, an encoder that nobody reads alone, or one that several families read.
    """
    found = _language(Path(model))
    if found is None:
        if family is not None:
            raise SepMEError(f"{model} holds no text encoder but CLIP, so there is no --family to choose.")
        return _clips(Path(model), options)
    files, tokenizer = found
    chosen = _family(files, family)
    reads_clip = POOLED in chosen.texts and chosen.texts[POOLED].encoder == "CLIP-L" and files.path != Path(model)
    pooled = _pooled(Path(model), options) if reads_clip else None
    read = _tokenizer(files, options.tokenizer or tokenizer)
    return FamilyEncoder(chosen, read, files.load(options.device, options.dtype), pooled, options.cache)


def pipeline_class(folder: Path) -> str:
    """The class that a folder's ``model_index.json`` names."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _language(path: Path) -> tuple[EncoderFiles, Path | None] | None:
    """The encoder at a path that is no CLIP, and the folder of its tokenizer if there is one."""
    if path.is_file():
        files = EncoderFiles.find(path) if path.suffix == ".safetensors" else None
        return None if files is None else (files, None)
    for encoder, tokenizer in (("", ""), *LANGUAGE):
        if (path / encoder / "config.json").is_file() and (files := EncoderFiles.find(path / encoder)) is not None:
            places = [p for p in (path / tokenizer, path / encoder) if any(p.glob("*token*")) or any(p.glob("*spiece*"))]
            return files, next(iter(places), None)
    return None


def _family(files: EncoderFiles, family: str | None) -> Family:
    """The family that an encoder is read for."""
    readings = {kind: (text.reading, text.widths) for kind, f in READ.items() if (text := f.texts[CONTEXT])}
    fitting = {kind: READ[kind] for kind, (reading, _) in readings.items() if reading is not None and reading.model == files.kind}
    exact = {k: f for k, f in fitting.items() if (r := readings[k])[0] is not None and len(r[0].states) * files.width in r[1]}
    if family is not None:
        if family in fitting:
            return fitting[family]
        raise SepMEError(
            f"No family {family!r} reads {files.path} alone; "
            + (f"choose --family {_either(fitting)}." if fitting else "train the concept in ComfyUI (SepME Train), which has all encoders.")
        )
    beside = _beside(files.path)
    if beside is not None:
        if beside.kind in fitting:
            return beside
        raise SepMEError(
            f"{beside.label or 'This model'} reads its text in a way that is only known in ComfyUI; train the concept there (SepME Train)."
        )
    if len(exact or fitting) == 1:
        return next(iter((exact or fitting).values()))
    raise SepMEError(
        f"{files.path} is a {files.kind} encoder of {files.width} channels, which several families read in ways of their own; say whose "
        f"prompts these are: --family {_either(exact or fitting)}."
    )


def _either(names: Any) -> str:
    *most, last = sorted(names)
    return f"{', '.join(most)} or {last}" if most else str(last)


def _beside(folder: Path) -> Family | None:
    """The family of the denoiser in the folder around an encoder's, if there is one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in (f for part in ("transformer", "unet") for f in (folder.parent / part).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise SepMEError(f"{file} is no safetensors file or is cut short ({first_line(error)}); get it again.") from None
    return recognise(shapes) if shapes else None


def _tokenizer(files: EncoderFiles, folder: str | Path | None) -> Tokenizer:
    """The tokenizer of a folder, or that among the weights."""
    encode: Tokenizer
    try:
        if folder is not None and (file := _spiece_file(Path(folder))) is not None:
            encode = _spiece(file.read_bytes(), files.kind)
        elif folder is not None:
            library = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            encode = lambda text: list(library(text).input_ids)  # noqa: E731
        elif files.spiece is not None:
            encode = _spiece(files.spiece, files.kind)
        else:
            raise SepMEError(
                f"{files.path} holds no tokenizer; name a folder that does (--tokenizer DIR: the model's own folder 'tokenizer', or one "
                "in ComfyUI's comfy/text_encoders)."
            )
        known = max(encode("a photo of a cat, by the sea"))
    except SepMEError:
        raise
    except Exception as error:  # whatever broken files make the loader raise
        raise SepMEError(f"The tokenizer in {folder or files.path} cannot be read ({type(error).__name__}: {first_line(error)}).") from None
    if known >= files.vocabulary:
        raise SepMEError(
            f"The tokenizer in {folder} has tokens that {files.path} does not know; name that of this encoder (--tokenizer DIR)."
        )
    return encode


def _spiece_file(folder: Path) -> Path | None:
    """SentencePiece's file of a folder that holds nothing else of a tokenizer."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return next((folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()), None)


def _spiece(data: bytes, kind: str) -> Tokenizer:
    """SentencePiece's tokenizer: T5 ends a text with a token of its own, language models begin it with one."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise SepMEError("This file's tokenizer needs a package; run: pip install sentencepiece.") from None
    ends = kind.endswith("t5")
    processor = SentencePieceProcessor(model_proto=data)
    begins = not ends and processor.bos_id() >= 0
    return lambda text: list(processor.encode(text, add_bos=begins, add_eos=ends))


def _pooled(folder: Path, options: LoadOptions) -> Callable[[str], Tensor]:
    """CLIP-L's vector of a prompt, of the CLIP beside a language model."""
    name, tokenizer, kind = PAIRS[0]
    clip, words = _clip(folder, name, tokenizer, kind, options)

    def pooled(prompt: str) -> Tensor:
        given = words(prompt, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt").input_ids
        found: Tensor = clip(given.to(clip.device)).pooler_output
        return found

    return pooled


def _clip(folder: Path, encoder: str, tokenizer: str, kind: Any, options: LoadOptions) -> tuple[Any, Any]:
    """A CLIP and its tokenizer."""
    path = folder / encoder
    refuse_pickle(path)
    for file in path.glob("*.safetensors"):
        check_file_precision(file)
    try:
        read = partial(kind.from_pretrained, use_safetensors=True, local_files_only=True)
        model = read(path).to(options.device, options.dtype).eval().requires_grad_(False)
        words = CLIPTokenizer.from_pretrained(folder / tokenizer, local_files_only=True)
    except Exception as error:  # whatever a broken folder makes the loaders raise
        if out_of_memory(error):
            raise
        raise SepMEError(
            f"{path} cannot be loaded ({type(error).__name__}: {first_line(error)}); it must hold CLIP, T5, Qwen or Gemma 2 as "
            f".safetensors, with its {tokenizer} beside it."
        ) from None
    if model.config.model_type != "clip_text_model":
        raise SepMEError(f"{path} holds a {model.config.model_type}; CLIP, T5, Qwen and Gemma 2 can be read without a model.")
    return model, words


def _clips(folder: Path, options: LoadOptions) -> PipelineEncoder:
    parts: dict[str, Any] = {"_execution_device": torch.device(options.device)}
    for encoder, tokenizer, kind in PAIRS:
        if (folder / encoder).is_dir():
            parts[encoder], parts[tokenizer] = _clip(folder, encoder, tokenizer, kind, options)
    return PipelineEncoder(SimpleNamespace(**parts), options.cache)
