"""Is a delta as separable as it says, with this text encoder?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..sepme.apply.composition import Composition
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.verify import Verification, check_encoder, verify
from ..sepme.errors import SepMEError
from ..sepme.plan.nearby import COUNT
from . import host
from .pictures import heat_map
from .sockets import CATEGORY, Deltas


class SepMEVerify(io.ComfyNode):
    """Node: certificates recomputed with a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEVerify",
            display_name="SepME Verify",
            category=CATEGORY,
            description="Measure with the model's own text encoder what each delta does to the other concepts' prompts: leakage matrix, "
            "gate margins, false touches of ordinary prompts.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that your prompts use."),
                Deltas.Input("deltas", tooltip="The deltas that are used together."),
            ],
            outputs=[
                io.String.Output("report", display_name="report"),
                io.Image.Output("heat_map", display_name="heat map", tooltip="Row: delta; column: prompts; red: touched."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: Any, deltas: Sequence[ConceptDelta]) -> io.NodeOutput:
        if not deltas:
            raise SepMEError("There are no deltas to verify; connect SepME Load Delta or SepME Train.")
        composition = Composition(tuple(deltas))
        job = host.NodeProgress(1)
        encoder = host.text_encoder(clip)
        warnings = check_encoder(encoder, deltas)
        result = verify(encoder, deltas, on_progress=job.stage, nearby=COUNT)
        job.next()
        image = heat_map(result.matrix, composition.names, composition.names, composition.gates.tolist())
        text = "\n".join([report(result), *warnings])
        return io.NodeOutput(text, image, ui=ui.PreviewImage(image, cls=cls).as_dict() | {"text": (text,)})


def report(result: Verification) -> str:
    """A few lines a delta."""
    lines = []
    for check in result.checks:
        worst = max(check.leakage_linear, key=lambda name: check.leakage_linear[name])
        lines += [
            f"{check.concept}: {'holds' if check.holds else 'DOES NOT HOLD'}",
            f"  {check.verdict}",
            f"  own prompts touched {check.own_touched:.0%}, smallest statistic {check.own_min:.4f}, gate {check.gate:.4f}",
            f"  worst that must not change: {worst}, {check.leakage_linear[worst]:.4f}, behind the gate {check.leakage_gated[worst]:.4f}",
            f"  ordinary prompts touched: {check.false_touch_rate:.2%}",
            *(
                f"  text {text}: {'holds' if part.holds else 'DOES NOT HOLD'}; own prompts touched {part.own_touched:.0%}, worst that must "
                f"not change {max(part.leakage_linear.values()):.4f}, gate {part.gate:.4f}"
                for text, part in check.parts.items()
            ),
        ]
    return "\n".join([*lines, *result.warnings])
