"""diffusers pipelines of other families than Stable Diffusion, to train through: their own call, which is stopped at its first step.

So whatever a family does with latents, timesteps, masks and signs is what its pipeline does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor

from ..errors import SepMEError, out_of_memory
from ..files import first_line
from ..model.blocks import TextBlocks
from ..model.lengths import Part, parts
from ..model.protocols import Encoding
from ..model.schedule import Prediction, Sampling, Schedule, ScheduledDenoiser
from .encoders import load_encoders, pipeline_class
from .language import FamilyEncoder
from .loading import PREDICTIONS, LoadOptions, open_folder, read_index

KINDS = (
    "AuraFlowPipeline", "ChromaPipeline", "FluxPipeline", "Lumina2Pipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
    "QwenImagePipeline", "WanPipeline", "ZImagePipeline",
)  # fmt: skip


def holds_transformer(path: Path) -> bool:
    """Whether a folder is a pipeline that :func:`load_transformer` loads."""
    return path.is_dir() and pipeline_class(path) in KINDS and (path / "transformer").is_dir()


def load_transformer(model: str, options: LoadOptions, family: str | None = None) -> TransformerHost:
    """A pipeline's folder, of which safetensors alone is read.

    Raises:
        SepMEError: files are missing or damaged, or what :func:`load_encoders` raises.
    """
    folder = Path(model)
    reader = load_encoders(model, options, family)
    assert isinstance(reader, FamilyEncoder)
    index = read_index(folder)
    models = [name for name in index if name.startswith("transformer") and (folder / name).is_dir()] + ["vae"]
    absent = [name for name, value in index.items() if isinstance(value, list) and name not in (*models, "scheduler")]
    pipe = open_folder(folder, index, getattr(diffusers, index["_class_name"]), models, absent, torch_dtype=options.dtype).to(
        options.device
    )
    return TransformerHost(pipe, reader, options.size)


class _FirstStep(Exception):
    """What the pipeline's call has come to: the model's output as the scheduler would get it, the latents, and the shift's logarithm, if
    it is the size's."""

    def __init__(self, predicted: Tensor, latents: Tensor, mu: float) -> None:
        super().__init__()
        self.predicted, self.latents, self.mu = predicted, latents, mu


class _Scheduler:
    """In the place of a pipeline's scheduler: one timestep, at which it stops."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any) -> None:
        self.config, self.timesteps, self.mu = config, torch.zeros(1), 0.0

    @property
    def sigmas(self) -> Tensor:
        """Of a flow."""
        return self.timesteps / self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: float = 0.0) -> None:
        self.mu = mu

    def set_begin_index(self, begin_index: int = 0) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        raise _FirstStep(model_output, sample, self.mu)


class TransformerHost(ScheduledDenoiser):
    """A pipeline as text encoder and denoiser; its parameters are frozen.

    Args:
        pipe: on its device, without text encoders.
        reader: of its prompts.
        size: pixels of an image's side; the pipeline's own if None.

    Its :attr:`latent_shape` and :attr:`schedule` raise SepMEError where the pipeline cannot be called, or not at this size, or what it
    predicts is not known.
    """

    free_length = True
    clip_skip = 0

    def __init__(self, pipe: Any, reader: FamilyEncoder, size: int | None = None) -> None:
        self.pipe, self._reader, self.name, self._size = pipe, reader, reader.name, size
        self.transformer = pipe.transformer
        for part in (value for value in pipe.components.values() if isinstance(value, torch.nn.Module)):
            part.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        self._scheduler, self._stop = pipe.scheduler, _Scheduler(pipe.scheduler.config)
        pipe.scheduler = self._stop
        self._takes = inspect.signature(type(pipe).__call__).parameters
        self._call = inspect.unwrap(type(pipe).__call__)  # without its no_grad

    @cached_property
    def _empty(self) -> Encoding:
        return self._reader.encode([""])

    @cached_property
    def _seen(self) -> _FirstStep:
        """A call without latents: what the pipeline makes of the size."""
        try:
            with torch.no_grad():
                return self._see(None, torch.ones(()), self._empty.context.to(self.device, self.dtype), self._empty.pooled)
        except Exception as error:  # whatever a pipeline with other parts than published, or of another size, raises
            if out_of_memory(error):
                raise
            kind = type(self.pipe).__name__
            raise SepMEError(f"This {kind} cannot be called ({first_line(error)}); check its folder, and --size.") from None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self._seen.latents.shape[1:])

    @cached_property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The noise levels of the pipeline's scheduler, shifted as for this size."""
        seen, scheduler, config = self._seen, self._scheduler, self._scheduler.config
        kind = "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else config.get("prediction_type")
        if kind == "flow_prediction":
            shift = config.get("shift") or config.get("flow_shift") or 1.0
            return Schedule.flow(config.num_train_timesteps, math.exp(seen.mu) if config.get("use_dynamic_shifting") and seen.mu else shift)
        if kind in PREDICTIONS:
            return Schedule.diffusion(scheduler.alphas_cumprod, cast(Prediction, kind))
        raise SepMEError(f"This model predicts {kind}, which is not known; choose --objective closed-form --edit context.")

    @property
    def device(self) -> torch.device:
        found: torch.device = self.transformer.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.transformer.dtype
        return found

    def attention_layers(self) -> Any:
        return TextBlocks.of(self.transformer) or {}

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """See :class:`~.language.FamilyEncoder`."""
        return self._reader.encode(prompts)

    def parts(self, context: Tensor, t: Tensor) -> list[Part]:
        return parts(context, self._empty.context.shape[1], t)

    def guided(self, sampling: Sampling) -> Sampling:
        return sampling._replace(guidance=1.0) if self.transformer.config.get("guidance_embeds") else sampling

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        """What the pipeline would hand its scheduler; all rows have one timestep."""
        levels, steps = self.schedule.s, self._stop.config.num_train_timesteps
        time = levels.to(t.device)[t[0]] * steps if self.schedule.prediction == "flow" else t[0]
        return self._see(x, time, context, extra).predicted

    def _see(self, latents: Tensor | None, time: Tensor, context: Tensor, extra: Tensor | None) -> _FirstStep:
        """The pipeline's call with prompts of equal length ``(rows, tokens, d_in)``, at a timestep."""
        self._stop.timesteps = time.reshape(1)
        there = context.detach().ne(0).any(dim=-1)
        rows = "list" in str(self._takes["prompt_embeds"].annotation)
        given = {
            "prompt_embeds": list(context) if rows else context,
            "pooled_prompt_embeds": None if extra is None else extra.to(context),
            "prompt_attention_mask": there,
            "prompt_embeds_mask": there,
            "true_cfg_scale": 1.0,
            "guidance_scale": 0.0,
            "num_frames": 1,
            "num_inference_steps": 1,
            "use_resolution_binning": False,
            "latents": latents,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
        }
        if self._size is not None:
            given |= {"height": self._size, "width": self._size}
        if "true_cfg_scale" in self._takes:
            del given["guidance_scale"]  # the number that the model is given, there
        try:
            self._call(self.pipe, **{name: value for name, value in given.items() if name in self._takes})
        except _FirstStep as seen:
            return seen.with_traceback(None)  # which holds all that the call had made
        raise SepMEError(f"This {type(self.pipe).__name__} has drawn without its scheduler; it cannot be trained through.")
