"""ComfyUI's model folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from safetensors import SafetensorError

from ...sepme.delta.library import DeltaLibrary
from ...sepme.errors import SepMEError
from ...sepme.files import refuse_pickle
from ...sepme.train.erasures import Erasures

FOLDER = "sepme"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def delta_folders() -> list[str]:
    """Where delta files are: models/sepme first, whatever was registered before or after it; new files go there."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    return list(dict.fromkeys([own, *folder_paths.get_folder_paths(FOLDER)]))


delta_library = DeltaLibrary(delta_folders)
erasures = Erasures(lambda: delta_library.folder / ".cache")


def delta_names() -> list[str]:
    """Names of the files in the folders, for a combo box: from ComfyUI's cache, no file is opened."""
    return [name.replace("\\", "/") for name in folder_paths.get_filename_list(FOLDER)]


def lora_folder() -> str:
    """The first of the host's LoRA folders."""
    return str(folder_paths.get_folder_paths("loras")[0])


def checkpoint_names() -> list[str]:
    """Checkpoints as the host lists them: paths below its folders."""
    return list(folder_paths.get_filename_list("checkpoints"))


def load_checkpoint(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a ``.safetensors`` checkpoint.

    Raises:
        SepMEError: no such file, a pickle, a damaged file, or one without one of the three.
    """
    name = str(name)  # a workflow may hold anything
    refuse_pickle(Path(name))
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise SepMEError(f"There is no {name[:120]!r} in models/checkpoints; put it there, or choose another checkpoint.")
    try:
        out = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=True, output_clip=True, embedding_directory=folder_paths.get_folder_paths("embeddings")
        )
    except SafetensorError:
        raise SepMEError(f"{name} is no safetensors file or is cut short; get it again.") from None
    model, clip, vae = out[:3]
    if model is None or clip is None or vae is None:
        raise SepMEError(f"{name} holds no complete model; load UNet, CLIP and VAE with ComfyUI's own loaders, they work just as well.")
    return model, clip, vae
