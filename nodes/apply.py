"""Deltas on a MODEL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..sepme.apply.toggles import parse_json
from ..sepme.delta.concept_delta import ConceptDelta
from . import host, queued
from .sockets import CATEGORY, TOGGLES_TIP, Deltas, folded


class SepMEApply(io.ComfyNode):
    """Node: deltas on a MODEL, with toggles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEApply",
            display_name="SepME Apply",
            category=CATEGORY,
            description="Erase concepts from a MODEL. Weights stay as they are: a toggle costs nothing, and pictures without "
            "the concept keep every bit. Works before or after LoRA loaders. A prompt's own <erase:...> and <keep:...> tags go "
            "before these toggles. Model Save and merges take weights only, so the erasure is not in their files: share deltas, or "
            "a LoRA of them by SepME Export.",
            inputs=folded([
                io.Model.Input("model", tooltip="The model that the deltas were made for, or one of the same architecture."),
                Deltas.Input("deltas", tooltip="From SepME Load Delta, SepME Train, or a chain of them."),
                io.String.Input("toggles", default="{}", optional=True, tooltip=f"{TOGGLES_TIP}erased."),
                io.Combo.Input(
                    "backend", options=["auto", "exact", "fused", "eager"], default="auto", optional=True,
                    tooltip="How keys and values are computed. auto: what is fastest here. exact: unerased prompts keep every bit. "
                    "fused: one kernel on a GPU. eager: plain PyTorch. What cannot run here falls back, and the log says so.",
                ),
                io.Boolean.Input(
                    "gate", default=True, optional=True,
                    tooltip="On: a delta acts only on prompts that carry its concept, all others stay bit-identical. "
                    "Off: on every prompt, as a LoRA would.",
                ),
            ], "backend", "gate"),
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, deltas: Sequence[ConceptDelta], toggles: str = "{}", backend: str = "auto", gate: bool = True
    ) -> io.NodeOutput:
        queued.refuse(cls.hidden)
        return io.NodeOutput(host.apply_deltas(model, tuple(deltas), parse_json(toggles), gate, backend))
