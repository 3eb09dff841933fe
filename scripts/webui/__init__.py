"""The extension for Automatic1111, Forge, reForge and Forge Neo. Only ``host.py`` knows their internals."""

from .axes import add_axes
from .host import on_before_ui, on_cfg_denoiser, on_ui_tabs
from .networks import register_tags
from .script import SepMEScript, watch
from .tab import make_tab

__all__ = ["SepMEScript", "register"]


def register() -> None:
    """Connect with the host; it forgets all callbacks before it loads scripts again."""
    on_before_ui(register_tags)
    on_before_ui(add_axes)
    on_cfg_denoiser(watch)
    on_ui_tabs(make_tab)
