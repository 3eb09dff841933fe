"""Models to work on: a checkpoint, or the embedded model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sepme.model.families import fits
from ..sepme.model.layers import fitting, kv_fingerprint, shapes
from . import host
from .sockets import CATEGORY


class SepMEDemoModel(io.ComfyNode):
    """Node: the embedded model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEDemoModel",
            display_name="SepME Demo Model",
            category=CATEGORY,
            description="A tiny Stable Diffusion that comes with SepME: no download, no GPU. It draws emoji of fifty things "
            "(rocket, red apple, church, dog ...) in the styles of nine studios (openmoji, glossy, blob, twemoji ...). "
            "Use it with ComfyUI's own nodes; latents of 128 x 128 pixels.",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*host.demo_model())


class SepMELoadCheckpoint(io.ComfyNode):
    """Node: a checkpoint, and which installed deltas fit it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMELoadCheckpoint",
            display_name="SepME Load Checkpoint",
            category=CATEGORY,
            description="Load a checkpoint (SD1.x, SD2.x, SDXL) and say which installed deltas fit it. "
            "ComfyUI's own Load Checkpoint works just as well.",
            inputs=[io.Combo.Input("ckpt_name", options=host.checkpoint_names(), tooltip="A .safetensors file in models/checkpoints.")],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                io.String.Output("info", display_name="info", tooltip="Architecture, K/V fingerprint, installed deltas that fit."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        model, clip, vae = host.load_checkpoint(str(ckpt_name))
        return io.NodeOutput(model, clip, vae, describe(model))


def describe(model: Any) -> str:
    """Architecture, K/V fingerprint and the installed deltas that fit, one per line."""
    layers = host.attention_layers(model.model)
    kinds, fingerprint = fitting(shapes(layers)), kv_fingerprint(layers)
    lines = [f"architecture: {kinds[0]}", f"K/V fingerprint: {fingerprint}", "installed deltas that fit:"]
    for entry in host.delta_library.entries():
        if entry.architecture not in kinds:
            continue
        note = "" if entry.kv_fingerprint == fingerprint else " - made on other weights of this architecture"
        if entry.architecture != kinds[0]:
            note = f" - fits {fits(entry.architecture)}"
        lines.append(f"  {entry.concept} ({entry.name}){note}")
    return "\n".join(lines if len(lines) > 3 else [*lines[:2], "installed deltas that fit: none"])
