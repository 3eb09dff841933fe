"""Everything that touches the hosts' internals: their interface, the loaded checkpoint, patches on it, the same as encoder and denoiser.

Automatic1111 and its Forges differ in where the UNet is, how it is patched and in which order rows come. Everything else is shared.
"""

from .checkpoint import ClipSkip, architectures_of, checkpoint_file, missing
from .drawing import thumbnails
from .hook import Hook
from .interface import (
    AlwaysVisible,
    ExtraNetwork,
    InputAccordion,
    Script,
    check_interrupted,
    checkpoint_folder,
    interrupt,
    job,
    library,
    lora_folder,
    on_before_ui,
    on_cfg_denoiser,
    on_ui_tabs,
    register_extra_network,
    script_modules,
)
from .loaded import LoadedModel, encoder_fingerprint, erased, loaded_model
from .patch import ModelPatch

__all__ = [
    "AlwaysVisible",
    "ClipSkip",
    "ExtraNetwork",
    "Hook",
    "InputAccordion",
    "LoadedModel",
    "ModelPatch",
    "Script",
    "architectures_of",
    "check_interrupted",
    "checkpoint_file",
    "checkpoint_folder",
    "encoder_fingerprint",
    "erased",
    "interrupt",
    "job",
    "library",
    "loaded_model",
    "lora_folder",
    "missing",
    "on_before_ui",
    "on_cfg_denoiser",
    "on_ui_tabs",
    "register_extra_network",
    "script_modules",
    "thumbnails",
]
