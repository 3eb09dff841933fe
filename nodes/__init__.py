"""SepME's ComfyUI nodes, one file a stage: concepts, train, deltas, apply, prompt, compare, verify. ``host/`` is all that knows ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host, queued
from .apply import SepMEApply
from .compare import SepMECompare
from .concepts import SepMEConcept, SepMEConceptBook
from .deltas import SepMEExport, SepMELoadDelta, SepMESaveDeltas
from .erase import SepMEErase
from .models import SepMEDemoModel, SepMELoadCheckpoint
from .prompt import SepMEConditioningToggles, SepMETextEncode
from .routes import register
from .train import SepMETrain
from .verify import SepMEVerify

NODES: list[type[io.ComfyNode]] = [
    SepMEErase,
    SepMEDemoModel,
    SepMELoadCheckpoint,
    SepMEConcept,
    SepMEConceptBook,
    SepMETrain,
    SepMESaveDeltas,
    SepMELoadDelta,
    SepMEApply,
    SepMETextEncode,
    SepMEConditioningToggles,
    SepMEVerify,
    SepMECompare,
    SepMEExport,
]


class SepMEExtension(ComfyExtension):
    """What ComfyUI asks of the pack: its nodes; the routes of its page are registered on the way."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register()  # the page's routes
        host.watch_prompts(queued.on_prompt)
        return NODES
