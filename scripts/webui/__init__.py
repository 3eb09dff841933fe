"""The extension for Automatic1111, Forge, reForge and Forge Neo. Only ``host/`` knows their internals."""

import sys
from pathlib import Path

from ... import kernels
from ...sepme.apply import ops
from .axes import add_axes
from .generation import watch
from .host import on_before_ui, on_cfg_denoiser, on_ui_tabs
from .networks import register_tags
from .script import SepMEScript
from .tab import make_tab

__all__ = ["SepMEScript", "register"]


def register() -> None:
    """Connect with the host; it forgets all callbacks before it loads scripts again."""
    kernels.register(ops)
    on_before_ui(leave_path)
    on_before_ui(register_tags)
    on_before_ui(add_axes)
    on_cfg_denoiser(watch)
    on_ui_tabs(make_tab)


def leave_path() -> None:
    """The host puts every extension's folder on ``sys.path``; our ``kernels`` and ``nodes`` must not be found there by others."""
    ours = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [p for p in sys.path if p != ours and str(Path(p).resolve()) != ours]
