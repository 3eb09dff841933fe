"""What an erasure changes: the same noise with and without it, and a grid of strengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.errors import SepMEError
from . import host, queued
from .graph import handed_on
from .pictures import beside, sheet
from .sockets import CATEGORY

MAX_STRENGTHS, MAX_PICTURES = 10, 64
GRID = 2  # number of the output


class SepMECompare(io.ComfyNode):
    """Node: pictures of one seed, stock and erased."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMECompare",
            display_name="SepME Compare",
            category=CATEGORY,
            description="See what an erasure changes: draws the prompt twice from one seed, without and with the erasure, and shows both "
            "under a slider. Takes the place of KSampler and VAE Decode. With something connected to 'grid', every concept is drawn at "
            "several strengths too.",
            inputs=[
                io.Model.Input("model", tooltip="From SepME Erase or SepME Apply."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="Size and number of the pictures: Empty Latent Image."),
                io.Vae.Input("vae", tooltip="From your checkpoint loader."),
                io.Int.Input("seed", default=7, min=0, max=2**64 - 1, control_after_generate=False, tooltip="Of both pictures."),
                io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="As in KSampler."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="As in KSampler."),
                io.Combo.Input("sampler_name", options=host.SAMPLERS, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=host.SCHEDULERS, default="normal", tooltip="As in KSampler."),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="For the grid: with it each concept is drawn from a prompt of its own, without it from 'positive'.",
                ),
                io.String.Input(
                    "strengths", default="0, 0.5, 1", optional=True,
                    tooltip="For the grid: the strengths that each concept is drawn at, all others being off.",
                ),
            ],
            outputs=[
                io.Image.Output("before", display_name="before", tooltip="Without the erasure."),
                io.Image.Output("after", display_name="after", tooltip="With the erasure."),
                io.Image.Output("grid", display_name="grid", tooltip="Row: concept; column: strength. Drawn when something is connected."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent_image: Mapping[str, Any], vae: Any, seed: int = 7, steps: int = 20,
        cfg: float = 7.0, sampler_name: str = "euler", scheduler: str = "normal", clip: Any = None, strengths: str = "0, 0.5, 1",
    ) -> io.NodeOutput:  # fmt: skip
        queued.refuse(cls.hidden)
        deltas = host.deltas_on(model)
        if not deltas:
            raise SepMEError("Nothing is erased from this MODEL; put SepME Erase or SepME Apply before SepME Compare.")
        columns = parse_strengths(strengths) if handed_on(cls.hidden, GRID) else []
        if len(deltas) * len(columns) > MAX_PICTURES:
            raise SepMEError(
                f"{len(deltas)} concepts at {len(columns)} strengths are too many pictures for one grid (at most {MAX_PICTURES}); "
                "write fewer strengths, or connect fewer concepts."
            )
        sampling = host.Sampling(seed, steps, cfg, sampler_name, scheduler)
        bar = host.NodeProgress(2 + len(deltas) * len(columns))

        def draw(prompt: Any, latent: Mapping[str, Any], toggles: Mapping[str, float] | None) -> Tensor:
            """Images ``(n, h, w, 3)``, with these strengths alone or, without any, as MODEL and prompt say."""
            given = [c if toggles is None else host.toggled(c, tags=toggles) for c in (prompt, negative)]
            images: Tensor = vae.decode(host.sample(model, given[0], given[1], latent, sampling, bar.show))
            bar.next()
            return images.reshape(-1, *images.shape[-3:])

        off = {d.concept.name: 0.0 for d in deltas}
        before, after = draw(positive, latent_image, off), draw(positive, latent_image, None)
        grid = beside(before, after)
        if columns:
            one = dict(latent_image) | {"samples": latent_image["samples"][:1]}
            rows = [[draw(_prompt(d, clip, positive), one, off | {d.concept.name: s})[0] for s in columns] for d in deltas]
            grid = sheet(rows, [d.concept.name for d in deltas], [f"{s:g}" for s in columns])
        shown = {name: ui.PreviewImage(images).as_dict()["images"] for name, images in (("before", before), ("after", after))}
        return io.NodeOutput(before, after, grid, ui={"sepme_compare": (shown,)})


def _prompt(delta: ConceptDelta, clip: Any, positive: Any) -> Any:
    """What a concept's row of the grid is drawn from."""
    return positive if clip is None else host.conditioning(clip, delta.concept.prompts[0])


def parse_strengths(text: str) -> Sequence[float]:
    """Numbers with commas between.

    Raises:
        SepMEError: something else, none, or too many.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not 1 <= len(found) <= MAX_STRENGTHS or not all(math.isfinite(s) and abs(s) <= 100 for s in found):
        raise SepMEError(f"The strengths {text[:60]!r} cannot be read; write 1 to {MAX_STRENGTHS} numbers with commas between: 0, 0.5, 1.")
    return found
