"""Options that commands share, each declared once; a group of them is one parameter of a command (:func:`grouped`)."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..errors import SepMEError, out_of_memory
from ..plan.nearby import COUNT
from ..train.objectives import described
from ..train.options import EDITS, TrainOptions, plan_options
from .common import register_kernels

if TYPE_CHECKING:
    from ..plan.directions import PlanOptions

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Files = Annotated[list[Path], typer.Argument(help="Delta files.")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the delta files.")]
Preserve = Annotated[Path | None, typer.Option(help="Text file of prompts that must not change, one per line; a delta knows its digest.")]
Size = Annotated[int | None, typer.Option(help="Pixels of an image's side; the model's own if not given.")]

NearbyWords = Annotated[
    int, typer.Option(help="How many words near a concept, of the tokenizer's own, must not change either and are measured; 0 for none.")
]


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command as typer reads it: a parameter that is a dataclass becomes its fields, one option or argument each."""
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            flat.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name], types = kind, get_type_hints(kind, include_extras=True)
        for f in fields(kind):
            default = inspect.Parameter.empty if f.default is MISSING else f.default
            flat.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[f.name]))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return command(**made, **given)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


@dataclass(frozen=True)
class ModelOptions:
    """Which model a command reads, where and how."""

    model: Annotated[
        str,
        typer.Argument(
            help="'demo', a diffusers folder or a .safetensors checkpoint (SD 1.x, 2.x, XL); or a text encoder, or Flux's folder ..."
        ),
    ]
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")] = "cpu"
    dtype: Annotated[str, typer.Option(help="The model's precision: float32, float16 or bfloat16; deltas are trained in float32.")] = (
        "float32"
    )
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, for single files.", envvar="SEPME_TOKENIZER")] = None
    prediction: Annotated[str | None, typer.Option(help="What the UNet predicts, epsilon or v_prediction; found out if not given.")] = None
    family: Annotated[
        str | None,
        typer.Option(help="Whose prompts a text encoder alone reads, where several families have it: flux1, chroma, z-image ..."),
    ] = None

    def load(self, size: int | None = None, alone: bool = False, training: bool = False) -> Any:
        """The model as a :class:`~sepme.hosts.diffusers.DiffusersHost`, or the text encoders of a file or folder that holds no other model.

        Args:
            size: pixels of an image's side, if not the model's own.
            alone: whether text encoders are enough.
            training: whether a model to train through is enough, which other families than Stable Diffusion have
                (:class:`~sepme.hosts.transformer.TransformerHost`).

        Raises:
            SepMEError: the libraries are not installed, an unknown precision, or the model cannot be loaded.
        """
        try:
            import diffusers
            import transformers

            from ..hosts.diffusers import DiffusersHost
            from ..hosts.encoders import holds_encoders, load_encoders
            from ..hosts.loading import DTYPES, LoadOptions
            from ..hosts.transformer import holds_transformer, load_transformer
        except ImportError as error:
            if out_of_memory(error):
                raise
            raise SepMEError(
                f"This command needs diffusers and transformers ({error.name} is missing); run: pip install 'comfyui-sepme[cli]'."
            ) from None
        for logging in (diffusers.utils.logging, transformers.utils.logging):
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        if self.dtype not in DTYPES:
            raise SepMEError(f"There is no precision {self.dtype!r}; choose one of {', '.join(DTYPES)}.")
        register_kernels()
        tokenizer = str(self.tokenizer) if self.tokenizer else None
        cache = cache_folder() if self.device == "cpu" else None  # elsewhere it takes seconds to make them
        options = LoadOptions(self.device, DTYPES[self.dtype], tokenizer, self.prediction, size, cache)
        if self.model != "demo" and holds_encoders(Path(self.model)):
            if training and not alone and holds_transformer(Path(self.model)):
                return load_transformer(self.model, options, self.family)
            if not alone:
                raise SepMEError(
                    f"{self.model} holds text encoders and no model that runs here; with them alone there are sepme train --objective "
                    "closed-form --edit context, sepme verify of what that makes, and nothing that draws."
                )
            return load_encoders(self.model, options, self.family)
        return DiffusersHost.load(self.model, options=options)


def cache_folder() -> Path:
    """Where the encodings of the shipped prompts are kept: in ``$SEPME_CACHE``, or ``sepme`` in the user's cache folder."""
    folder = os.environ.get("SEPME_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sepme"
    return Path(folder) / "encodings"


@dataclass(frozen=True)
class NullSpace:
    """How much room a delta leaves to everything else that is known."""

    null_space: Annotated[
        str | None,
        typer.Option(
            help="For experts: how strictly everything else is left alone: exact, tolerance (the default), soft (from 50 concepts on); "
            "auto: as strictly as fits."
        ),
    ] = None
    tolerance: Annotated[float | None, typer.Option(help="For experts: relative singular value that counts as null (0.006).")] = None
    max_rank: Annotated[int | None, typer.Option(help="For experts: cap on the rank, and so the size, of a file (8).")] = None
    nearby: NearbyWords = COUNT

    def plan(self, mode: str = "subspace", **more: Any) -> PlanOptions:
        """How directions are planned for a training mode; what is not given is the mode's own."""
        chosen = {"mode": self.null_space, "tolerance": self.tolerance, "max_rank": self.max_rank, "nearby": self.nearby}
        return plan_options(mode, **chosen | more)


@dataclass(frozen=True)
class Hyperparameters:
    """What training does; fields are named as in :class:`~sepme.train.options.TrainOptions`."""

    objective: Annotated[str, typer.Option(help=described())] = "gcirs"
    mode: Annotated[
        str,
        typer.Option(
            help="For experts. subspace: small files that leave everything else alone. paper: as published. unrestricted: any change of "
            "weights, which cannot be taken back."
        ),
    ] = "subspace"
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 1000
    batch: Annotated[int, typer.Option(help="Pictures per step; fewer need less memory.")] = 4
    learning_rate: Annotated[float | None, typer.Option(help="Adam's; by default 0.03 (subspace), 0.1 (paper), 1e-5 (unrestricted).")] = (
        None
    )
    guidance: Annotated[float, typer.Option(help="How far past the empty prompt ESD aims.")] = 1.0
    threshold: Annotated[float, typer.Option(help="For experts: training stops when the running mean of the loss falls to this.")] = 0.0
    regularise: Annotated[str, typer.Option(help="For experts: what the L1 term is taken of, w or delta.")] = "w"
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0
    warm_start: Annotated[bool | None, typer.Option(help="Start G-CiRs from the closed form (default in mode subspace).")] = None
    values_only: Annotated[bool, typer.Option("--values-only", help="Leave to_k as it is.")] = False
    edit: Annotated[str, typer.Option(help="What a delta changes. " + " ".join(f"{k}: {v}." for k, v in EDITS.items()))] = "layers"

    def options(self) -> TrainOptions:
        """The same with the defaults of mode and objective.

        Raises:
            SepMEError: an unknown choice, a value out of range, or options that do not go together.
        """
        return TrainOptions.for_mode(**vars(self))
