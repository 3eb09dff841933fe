"""Toggles of a prompt's own."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io

from ..sepme.apply.toggles import parse_json, parse_tags
from ..sepme.errors import SepMEError
from . import host, queued
from .sockets import CATEGORY, TOGGLES_TIP

OWN = "as SepME Apply says"


class SepMETextEncode(io.ComfyNode):
    """Node: a prompt with tags, encoded; the CONDITIONING carries the tags' toggles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMETextEncode",
            display_name="SepME Text Encode",
            category=CATEGORY,
            description="Encode a prompt with its own switches: 'a city <erase:van gogh>', 'a star <erase:star:0.5>', '<keep:picasso>'. "
            "The tags are gone before the text encoder sees the prompt, and they go before all other toggles.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="", tooltip="The prompt, tags included."),
                io.String.Input("toggles", default="{}", optional=True, tooltip=f"{TOGGLES_TIP}{OWN}."),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("cleaned_text", display_name="cleaned text", tooltip="The prompt without tags."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, toggles: str = "{}") -> io.NodeOutput:
        queued.refuse(cls.hidden)
        if re.search("[\ud800-\udfff]", text):
            raise SepMEError("The prompt holds half a character, which is not valid text; type it again.")
        cleaned, tags = parse_tags(text)
        conditioning = host.conditioning(clip, cleaned)
        return io.NodeOutput(host.toggled(conditioning, parse_json(toggles), tags, host.clip_skip(clip)), cleaned)


class SepMEConditioningToggles(io.ComfyNode):
    """Node: toggles for a CONDITIONING that another node made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEConditioningToggles",
            display_name="SepME Conditioning Toggles",
            category=CATEGORY,
            description="Switch concepts for one prompt (an area, a mask, a time range), whatever node encoded it. Tags in the prompt's "
            "text go before these toggles, these before SepME Apply's.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="A prompt, or several combined: all get these toggles."),
                io.String.Input("toggles", default="{}", tooltip=f"{TOGGLES_TIP}{OWN}."),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, conditioning: list[Any], toggles: str = "{}") -> io.NodeOutput:
        queued.refuse(cls.hidden)
        return io.NodeOutput(host.toggled(conditioning, parse_json(toggles)))
