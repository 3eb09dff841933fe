"""Everything that touches ComfyUI's internals: its text encoders, UNets, patches, folders, progress. Nodes use nothing else of it."""

from ...sepme.errors import SepMEError
from .demo import demo_model
from .denoiser import HostDenoiser, UNetDenoiser, attention_layers, changeable_layers, text_blocks
from .files import checkpoint_names, delta_library, delta_names, erasures, load_checkpoint, lora_folder
from .jobs import NodeProgress, check_interrupted, free_memory, loaded, part_of, trainable
from .language import LanguageEncoder, adapts
from .page import architectures_of, notice, outputs_of, saves, tell_page, watch_prompts, web_routes
from .patch import apply_deltas, deltas_on, toggled
from .sampling import SAMPLERS, SCHEDULERS, Sampling, sample
from .text import ClipEncoder, clip_skip, conditioning, text_encoder
from .transformer import TransformerDenoiser, denoiser_of

SepMEError.__module__ = "sepme"  # ComfyUI shows an error's type with its module, which is the path of a folder here

__all__ = [
    "SAMPLERS",
    "SCHEDULERS",
    "ClipEncoder",
    "HostDenoiser",
    "LanguageEncoder",
    "NodeProgress",
    "Sampling",
    "TransformerDenoiser",
    "UNetDenoiser",
    "adapts",
    "apply_deltas",
    "architectures_of",
    "attention_layers",
    "changeable_layers",
    "check_interrupted",
    "checkpoint_names",
    "clip_skip",
    "conditioning",
    "delta_library",
    "delta_names",
    "deltas_on",
    "demo_model",
    "denoiser_of",
    "erasures",
    "free_memory",
    "load_checkpoint",
    "loaded",
    "lora_folder",
    "notice",
    "outputs_of",
    "part_of",
    "sample",
    "saves",
    "tell_page",
    "text_blocks",
    "text_encoder",
    "toggled",
    "trainable",
    "watch_prompts",
    "web_routes",
]
