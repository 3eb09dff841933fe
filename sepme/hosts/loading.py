"""Pipelines from the embedded model, a diffusers folder or a single-file checkpoint. Only safetensors is read; no download."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from ..checks import check_number
from ..errors import SepMEError, out_of_memory
from ..files import check_file_precision, first_line, refuse_pickle
from . import ldm
from .tokenizers import END, clip_tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "model"
PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
PREDICTIONS = ("epsilon", "v_prediction")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        device: as PyTorch names it.
        dtype: of the weights (delta factors stay float32).
        tokenizer: folder of CLIP's tokenizer, for single files.
        prediction: what the UNet predicts; found out when None.
        size: pixels of an image's side; the model's own when None.
        cache: folder where encodings of the shipped prompts are kept, if anywhere.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tokenizer: str | None = None
    prediction: str | None = None
    size: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_number("size", self.size, 8, 1 << 14, whole=True)
        if self.prediction not in (None, *PREDICTIONS):
            raise SepMEError(f"There is no prediction type {self.prediction!r}; choose epsilon or v_prediction.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise SepMEError(
                f"The device {self.device!r} cannot be used ({first_line(error)}); choose cpu, or a device that PyTorch finds."
            ) from None


def load_pipeline(model: str, options: LoadOptions) -> Any:
    """Load ``demo``, a diffusers folder or a ``.safetensors`` file.

    Returns:
        a ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline`` on the device.

    Raises:
        SepMEError: nothing there, another architecture, parts missing, damaged files, no tokenizer, not enough memory.
    """
    path = DEMO if model == "demo" else Path(model)
    refuse_pickle(path)
    if path.suffix.lower() == ".gguf":
        raise SepMEError(f"{path} is a GGUF file, whose weights are quantised; use the .safetensors file in float16, bfloat16 or float32.")
    if path.is_file():
        pipe = _from_file(path, options)
    elif (path / "model_index.json").is_file():
        pipe = _from_folder(path, options)
    else:
        raise SepMEError(
            f"{path} is neither a .safetensors checkpoint nor a diffusers folder (it has no model_index.json); "
            "name one, or 'demo' for the embedded model."
        )
    if pipe.unet.config.in_channels != 4 or pipe.unet.config.get("class_embed_type"):
        raise SepMEError(f"{path} reads more than text and a latent image; only text-to-image models can be used.")
    pipe = pipe.to(options.device)
    if path == DEMO:
        for part in (pipe.unet, pipe.vae):  # a quarter faster on a CPU
            part.to(memory_format=torch.channels_last)
    return pipe


def _from_folder(folder: Path, options: LoadOptions) -> Any:
    index = read_index(folder)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise SepMEError(f"{folder} holds a {str(kind)[:60]}; only {' and '.join(PIPELINES)} can be loaded.")
    encoders = ("text_encoder", "text_encoder_2") if "XL" in kind else ("text_encoder",)
    absent = ("safety_checker",) if kind == "StableDiffusionPipeline" else ()
    pipe = open_folder(folder, index, PIPELINES[kind], ("unet", "vae", *encoders), absent, low_cpu_mem_usage=False).to(options.dtype)
    if options.prediction:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=options.prediction)
    return pipe


def read_index(folder: Path) -> dict[str, Any]:
    """What a diffusers folder's ``model_index.json`` says.

    Raises:
        SepMEError: nothing that can be read.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return dict(index)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from None


def open_folder(
    folder: Path, index: Mapping[str, Any], kind: Any, parts: Sequence[str], absent: Sequence[str], **how: Any
) -> Any:  # fmt: skip
    """A diffusers folder's pipeline, on the CPU.

    Args:
        index: see :func:`read_index`.
        kind: the pipeline's class.
        parts: its models that are read.
        absent: its components that are left out.
        how: what else ``from_pretrained`` is told.

    Raises:
        SepMEError: it holds code, parts are missing or no safetensors, quantised or damaged.
    """
    try:
        if any(folder.rglob("*.py")):
            raise SepMEError(f"{folder} holds Python code, which is never run; get the plain folder of the model.")
        files = {part: list((folder / part).glob("*.safetensors")) for part in parts}
        for part, found in files.items():
            if (index.get(part) or [None])[0] not in ("diffusers", "transformers") or not found:
                raise SepMEError(f"{folder} has no {part} as .safetensors, which is the only format that is read; get the folder with it.")
        for file in (file for found in files.values() for file in found):
            check_file_precision(file)
        variant = None if all(any(".fp16" not in file.name for file in found) for found in files.values()) else "fp16"
        how |= {"use_safetensors": True, "local_files_only": True, "variant": variant} | dict.fromkeys(absent)
        pipe = kind.from_pretrained(folder, **how)
    except (SepMEError, MemoryError):
        raise
    except Exception as error:  # whatever a broken folder makes the loaders raise
        if out_of_memory(error):
            raise
        raise _damaged(folder, error) from None
    for part in parts:
        for parameter in getattr(pipe, part).parameters():  # mapped from a file it may lie at any offset, and kernels round by alignment
            parameter.data = parameter.data.clone()
    return pipe


def _damaged(folder: Path, error: Exception) -> SepMEError:
    return SepMEError(f"{folder} cannot be loaded ({type(error).__name__}: {first_line(error)}); check that its files are complete.")


def _from_file(path: Path, options: LoadOptions) -> Any:
    file = ldm.Checkpoint.open(path)
    pads = {"sd1": (END,), "sd2": ("!",), "sdxl": (END, "!")}[file.kind]
    tokenizers = [clip_tokenizer(options.tokenizer, pad) for pad in pads]
    if max(tokenizers[0].get_vocab().values()) >= ldm.vocabulary(file):
        raise SepMEError(
            f"The tokenizer has {len(tokenizers[0])} tokens, the text encoder of {path} knows {ldm.vocabulary(file)}; name the tokenizer "
            "of this model (--tokenizer DIR)."
        )
    encoders = ldm.text_encoders(file, options.dtype, tokenizers[0].eos_token_id)
    parts = {"vae": ldm.vae(file, options.dtype), "unet": ldm.unet(file, options.dtype)}
    prediction = options.prediction or _declared_prediction(file)
    scheduler = DDIMScheduler(**ldm.SCHEDULE, prediction_type=prediction or "epsilon")
    if file.kind == "sdxl":
        return StableDiffusionXLPipeline(
            **parts, scheduler=scheduler, text_encoder=encoders[0], text_encoder_2=encoders[1],
            tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], add_watermarker=False,
        )  # fmt: skip
    pipe = StableDiffusionPipeline(
        **parts, scheduler=scheduler, text_encoder=encoders[0], tokenizer=tokenizers[0],
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    if file.kind == "sd2":
        prediction = prediction or probe_prediction(pipe.to(options.device))
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type=prediction)
        if prediction == "v_prediction":
            pipe.unet.register_to_config(sample_size=96)  # the published v models draw 768 pixels
    return pipe


def _declared_prediction(file: ldm.Checkpoint) -> str | None:
    """What the file itself says: ``modelspec.prediction_type``, or the empty tensor ``v_pred`` of v-predicting SDXL models."""
    declared = {"epsilon": "epsilon", "v": "v_prediction"}.get(file.metadata.get("modelspec.prediction_type", ""))
    return declared or ("v_prediction" if "v_pred" in file.shapes else None)


@torch.no_grad()
def probe_prediction(pipe: Any) -> str:
    """Tell ε from v by one look at pure noise, since SD 2.x weights of both kinds have the same keys and shapes.

    At the last timestep ``x_t ≈ ε``, so an ε model returns about its input; ``v = α ε − σ x_0`` with α ≈ 0.07 there hardly contains it.
    """
    ids = pipe.tokenizer([""], padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(pipe.unet.device, pipe.unet.dtype)
    last = pipe.scheduler.config.num_train_timesteps - 1
    out = pipe.unet(noise, last, encoder_hidden_states=pipe.text_encoder(ids.to(pipe.unet.device))[0]).sample
    alike = torch.nn.functional.cosine_similarity(out.float().flatten(), noise.float().flatten(), dim=0)
    return "epsilon" if float(alike) > 0.5 else "v_prediction"
