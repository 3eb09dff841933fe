"""ComfyUI's entry point; the nodes are in ``nodes/``, the library in ``sepme/``."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    from . import kernels
    from .nodes import SepMEExtension
    from .sepme.apply import ops

    kernels.register(ops)
    return SepMEExtension()
