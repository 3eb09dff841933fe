"""Delta files: saved, found again, handed to others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..sepme.concepts import file_name
from ..sepme.convert import export_lora
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.library import DeltaLibrary
from ..sepme.errors import SepMEError
from ..sepme.model.layers import weights
from . import host, workflow
from .prefix import filled
from .sockets import CATEGORY, Deltas

PREFIX_TIP = "Put before the concept's name; with / for subfolders, and %date:yyyy-MM-dd% or %hour% for the time."


class SepMESaveDeltas(io.ComfyNode):
    """Node: deltas into files of the library."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMESaveDeltas",
            display_name="SepME Save Deltas",
            category=CATEGORY,
            description="Write each delta to models/sepme as a file of its own. "
            "Files are never replaced: other content gets another number.",
            inputs=[
                Deltas.Input("deltas", tooltip="From SepME Train."),
                io.String.Input("filename_prefix", default="", optional=True, tooltip=PREFIX_TIP),
                io.Boolean.Input(
                    "embed", default=False, optional=True,
                    tooltip="Put the deltas into the workflow too: a JSON or PNG of it is then all that another person "
                    "needs (up to 4 MB a delta).",
                ),
            ],
            outputs=[Deltas.Output("deltas_out", display_name="DELTAS")],
            hidden=[io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, deltas: Sequence[ConceptDelta], filename_prefix: str = "", embed: bool = False) -> io.NodeOutput:
        library, texts, filename_prefix = host.delta_library, [], filled(filename_prefix)
        for delta in deltas:  # all names and sizes are good before anything is written
            library.place(f"{filename_prefix}{file_name(delta.concept.name)}")
        records = {delta.content_hash(): workflow.record(delta, "", embed) for delta in deltas}
        for delta in deltas:
            path = library.save(delta, filename_prefix)
            records[delta.content_hash()]["file"] = path.relative_to(library.folder).as_posix()
            texts.append(f"{delta.concept.name}: {path}")
        for content_hash, entry in records.items():
            workflow.remember(cls.hidden.extra_pnginfo, content_hash, entry)
        return io.NodeOutput(tuple(deltas), ui={"text": ("\n".join(texts),), "sepme": (records,)})


class SepMELoadDelta(io.ComfyNode):
    """Node: a delta from the library, found again by its content hash if the file was renamed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMELoadDelta",
            display_name="SepME Load Delta",
            category=CATEGORY,
            description="Load a delta from models/sepme. With a content hash it is found even if its file was renamed or moved, and no "
            "other file is taken for it; a delta that travels inside the workflow needs no file.",
            inputs=[
                io.Combo.Input("delta", options=host.delta_names(), tooltip="A file in models/sepme."),
                io.String.Input(
                    "content_hash", default="", optional=True,
                    tooltip="SHA-256 of its content, as 'sepme inspect' and the file's metadata say. Empty: whatever the file holds.",
                ),
                Deltas.Input("deltas", optional=True, tooltip="Deltas of an earlier node; this one is added."),
            ],
            outputs=[Deltas.Output("deltas_out", display_name="DELTAS")],
            hidden=[io.Hidden.extra_pnginfo],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, delta: str) -> bool:
        """Anything goes here: a file that is not in the list may be found by its hash, or lie in the workflow."""
        return True

    @classmethod
    def fingerprint_inputs(cls, delta: str = "", content_hash: str = "", deltas: Any = None) -> str:
        states = []
        for path in host.delta_library.find(str(delta), str(content_hash).strip().lower()):
            with suppress(OSError):  # removed meanwhile
                states.append(f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}")
        return "\n".join(states)

    @classmethod
    def execute(cls, delta: str, content_hash: str = "", deltas: Sequence[ConceptDelta] | None = None) -> io.NodeOutput:
        extra = cls.hidden.extra_pnginfo
        found = find(str(delta), content_hash.strip().lower(), extra)
        workflow.remember(extra, found.content_hash(), workflow.record(found, str(delta).replace("\\", "/"), False))
        earlier = tuple(deltas or ())
        if any(d.content_hash() == found.content_hash() for d in earlier):
            raise SepMEError(f"The delta of {found.concept.name!r} is loaded twice; remove one of the two nodes.")
        return io.NodeOutput((*earlier, found))


def find(name: str, content_hash: str, extra_pnginfo: Any) -> ConceptDelta:
    """A delta by file, by hash, or from the workflow.

    Raises:
        SepMEError: it is nowhere; the message says how to make it again.
    """
    if not name.strip() and not content_hash:
        raise SepMEError("No delta is chosen; put delta files into models/sepme, or make one with SepME Train and SepME Save Deltas.")
    found = host.delta_library.load(name, content_hash)
    if found is not None:
        return found
    entry = workflow.recall(extra_pnginfo, content_hash, name.replace("\\", "/"))
    delta = workflow.carried(entry)
    if delta is not None and content_hash in ("", delta.content_hash()):
        return delta
    what = f"The delta of {entry['concept']!r}" if entry and entry.get("concept") else f"The delta {name[:120]!r}"
    told = f" (content hash {content_hash[:64]})" if content_hash else ""
    other = f"; {name} is there, but holds another one" if content_hash and host.delta_library.find(name) else ""
    raise SepMEError(f"{what}{told} is not in models/sepme{other}. Put its file there, {workflow.again(entry)}.")


class SepMEExport(io.ComfyNode):
    """Node: deltas as one LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEExport",
            display_name="SepME Export",
            category=CATEGORY,
            description="Hand deltas to others: as SepME's own files, or as one LoRA that any tool loads (into models/loras). A LoRA has "
            "no gate: it acts on every prompt, so pictures without the concept change a little too.",
            inputs=[
                Deltas.Input("deltas", tooltip="What to export; a LoRA holds all of them."),
                io.Combo.Input(
                    "format",
                    options=["delta", "lora"],
                    default="delta",
                    optional=True,
                    tooltip="delta: exact, one file each. lora: one file.",
                ),
                io.String.Input("filename_prefix", default="", optional=True, tooltip=PREFIX_TIP),
                io.Model.Input("model", optional=True, tooltip="The model that a LoRA is for; only where a delta edits the context."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, deltas: Sequence[ConceptDelta], format: str = "delta", filename_prefix: str = "", model: Any = None) -> io.NodeOutput:
        if not deltas:
            raise SepMEError("There are no deltas to export; connect SepME Load Delta or SepME Train.")
        filename_prefix = filled(filename_prefix)
        if format == "delta":
            paths = [host.delta_library.save(delta, filename_prefix) for delta in deltas]
        else:
            if model is None and any(d.edits_context for d in deltas):
                raise SepMEError("Some of these deltas edit the context; as a LoRA they depend on a model's weights, so connect the model.")
            read = weights(host.attention_layers(model.model)) if model is not None else None
            paths = [export_lora(deltas, lora_path(deltas, filename_prefix), weights=read)]
        return io.NodeOutput(ui={"text": ("\n".join(map(str, paths)),)})


def lora_path(deltas: Sequence[ConceptDelta], prefix: str) -> Path:
    """A file name in models/loras that is not taken."""
    name = f"{prefix}{file_name('-'.join(d.concept.name for d in deltas))[:80]}-lora"
    return next(path for path in DeltaLibrary(lambda: [host.lora_folder()]).numbered(name) if not path.exists())
