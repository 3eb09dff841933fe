"""What becomes of a prompt when it is queued, before ComfyUI looks at it.

ComfyUI hands every queued prompt to extensions (``PromptServer.add_on_prompt_handler``). With SepME Apply or SepME Erase in it

- core's CLIP Text Encode reads tags as SepME Text Encode does: it becomes one, under its own id, where its text has tags, comes from
  another node, or where it matters which clip skip it was read with;
- a tag that names none of the prompt's concepts, and one in a text node that cannot read it, is an error of the node at fault, or of
  the node that erases. ComfyUI takes no error from here, so the node gets an input :data:`REFUSED` that it raises when it runs, and
  that makes it run although it ran before.
- the page is told where the erasure is lost on the way into a file, and what was found by a training or planning that does not run again.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ..sepme.apply.toggles import parse_json, parse_tags
from ..sepme.concepts import ConceptBook
from ..sepme.delta.library import Entry, resolve
from ..sepme.errors import SepMEError
from . import host, workflow
from .facts import describe
from .graph import Graph
from .rows import parse_rows

REFUSED = "refused"
APPLY, ERASE, OUR_TEXT, CORE_TEXT = "SepMEApply", "SepMEErase", "SepMETextEncode", "CLIPTextEncode"
SWITCHES, TRAIN = "SepMEConditioningToggles", "SepMETrain"
MAX_MADE = 256

log = logging.getLogger("sepme")
_made: OrderedDict[str, Any] = OrderedDict()  # facts of what trainings made, by everything that went into them


def refuse(hidden: Any) -> None:
    """Raise what the running node was refused for; it has hidden inputs ``prompt`` and ``unique_id``.

    Raises:
        SepMEError: it was.
    """
    node = (hidden.prompt or {}).get(hidden.unique_id) if hidden else None
    reason = node["inputs"].get(REFUSED) if node else None
    if isinstance(reason, str):
        raise SepMEError(reason)


def remember(hidden: Any, facts: Any) -> None:
    """Keep what a training or planning made for a page that is loaded later; see :func:`on_prompt`."""
    if hidden and hidden.prompt and hidden.unique_id in hidden.prompt:
        _made[_signature(Graph(hidden.prompt, host.outputs_of), hidden.unique_id)] = facts
        while len(_made) > MAX_MADE:
            _made.popitem(last=False)


def _signature(graph: Graph, node: str) -> str:
    """Everything that a node's outputs depend on."""
    text = json.dumps({n: (graph.kind(n), graph.inputs(n)) for n in graph.above([node])}, sort_keys=True, default=repr)
    return json.dumps(json.loads(text, parse_int=float))  # a page queues 0 for 0.0, and ComfyUI makes it 0.0 before the node runs


def on_prompt(data: Any) -> Any:
    """ComfyUI's hook: the request for ``/prompt``, changed in place."""
    prompt, extra = data.get("prompt"), data.get("extra_data")
    prepare(prompt, extra.get("extra_pnginfo") if isinstance(extra, dict) else None)
    graph = Graph(prompt, host.outputs_of)
    for node, text in lost(graph).items():
        log.warning("%s: %s", graph.title(node), text)
        host.notice(text, node, data.get("client_id"))
    for node in graph.of(TRAIN, ERASE):
        facts = _made.get(_signature(graph, node))
        if facts is not None:
            host.tell_page("sepme.made", {"node": node, "sepme_made": facts}, data.get("client_id"))
    return data


def prepare(prompt: Any, extra_pnginfo: Any = None) -> None:
    """Make core's text nodes read tags, and mark what must be refused; see above."""
    graph = Graph(prompt, host.outputs_of)
    for node in graph.of(APPLY, ERASE, OUR_TEXT, SWITCHES):
        graph.inputs(node).pop(REFUSED, None)
    applied = graph.of(APPLY, ERASE)
    together = graph.below(applied)
    texts = [n for n in graph.nodes if n not in applied and not together.keys().isdisjoint(graph.below([n]))] if applied else []
    known = concepts(graph, extra_pnginfo) if texts else None
    skipped = graph.of("CLIPSetLastLayer") or any(describe(k)["clip_skip"] for k in known or () if isinstance(k, Entry))
    for node in texts:
        if graph.kind(node) == CORE_TEXT and (skipped or graph.link(graph.inputs(node).get("text")) or has_tags(graph, node)):
            graph.nodes[node]["class_type"] = OUR_TEXT
    for node in texts:
        if graph.kind(node) in (OUR_TEXT, SWITCHES):
            if known is not None and (reason := unknown(graph, node, known)):
                graph.inputs(node)[REFUSED] = reason
        elif encodes(graph, node) and has_tags(graph, node):
            graph.inputs(applied[0])[REFUSED] = (
                f"There is a tag in {graph.title(node)!r} (node {node}), which reads it as words; write the prompt into SepME Text Encode "
                "or CLIP Text Encode, or take the tag out and put SepME Conditioning Toggles behind that node."
            )


def encodes(graph: Graph, node: str) -> bool:
    """Whether a node that is not ours makes a prompt's CONDITIONING, as such or inside a pipe."""
    kinds = () if graph.kind(node).startswith("SepME") else graph.used(node)
    return any(kind == "CONDITIONING" or "PIPE" in kind for kind in kinds)


def has_tags(graph: Graph, node: str) -> bool:
    """Whether a text of this node has a tag, or something that was meant as one."""
    for text in graph.texts(node):
        try:
            if parse_tags(text)[1]:
                return True
        except SepMEError:
            return True
    return False


def unknown(graph: Graph, node: str, known: Sequence[str | Entry]) -> str:
    """A sentence for a tag or toggle of this node that means none of the known concepts; nothing when there is none.

    What cannot be read is left to the node, which says so.
    """
    toggles = graph.inputs(node).get("toggles")
    names: list[str] = []
    try:
        names += parse_json(toggles) if isinstance(toggles, str) else ()
        if graph.kind(node) == OUR_TEXT:
            names += [name for text in graph.texts(node) for name in parse_tags(text)[1]]
    except SepMEError:
        return ""
    for name in names:
        if not resolve(name, known):
            loaded = ", ".join(dict.fromkeys(k if isinstance(k, str) else k.concept for k in known)) or "none"
            return f"There is no concept {name[:60]!r} here; loaded concepts: {loaded}."
    return ""


def concepts(graph: Graph, extra_pnginfo: Any) -> list[str | Entry] | None:
    """The concepts that some SepME Apply or SepME Erase takes off a MODEL, or more; None when that shows only when it runs."""
    found: list[str | Entry] = []
    sources = (link[0] for a in graph.of(APPLY, ERASE) if (link := graph.link(graph.inputs(a).get("deltas"))))
    for node in dict.fromkeys([*reversed(graph.above(sources)), *graph.of(ERASE)]):  # as they are chained
        more = named(graph, node, extra_pnginfo)
        if more is None:
            return None
        found += more
    return found


def named(graph: Graph, node: str, extra_pnginfo: Any) -> Sequence[str | Entry] | None:
    """The concepts that one node names; None when that cannot be told."""
    kind, inputs = graph.kind(node), graph.inputs(node)
    if kind == "SepMELoadDelta":
        return loaded(inputs, extra_pnginfo) or None
    if kind == ERASE:
        return erased(inputs, extra_pnginfo)
    if kind == "SepMEConcept":
        return [inputs["name"]] if isinstance(inputs.get("name"), str) else None
    if kind == "SepMEConceptBook":
        try:
            return [c.name for c in ConceptBook.loads(inputs["book"]).concepts] if isinstance(inputs.get("book"), str) else None
        except SepMEError:
            return None
    foreign = not kind.startswith("SepME") and {"DELTAS", "CONCEPTS", "*"} & graph.used(node)
    return None if foreign else []


def loaded(inputs: dict[str, Any], extra_pnginfo: Any) -> list[str | Entry]:
    """What SepME Load Delta will load, as far as can be told."""
    name, content_hash = str(inputs.get("delta", "")), str(inputs.get("content_hash", "")).strip().lower()
    paths = host.delta_library.find(name, content_hash)[:1]
    if paths:
        return [e for e in host.delta_library.entries() if e.path in paths]
    record = workflow.recall(extra_pnginfo, content_hash, name.replace("\\", "/"))
    return [str(record["concept"])] if record and record.get("concept") else []


def erased(inputs: dict[str, Any], extra_pnginfo: Any) -> Sequence[str | Entry] | None:
    """The concepts of SepME Erase's rows; None where a wire brings them, or they cannot be read, which the node says."""
    try:
        rows = parse_rows(inputs["concepts"]) if isinstance(inputs.get("concepts"), str) else None
    except SepMEError:
        return None
    if rows is None:
        return None
    saved = [e for r in rows if r.saved for e in loaded({"delta": r.file, "content_hash": r.content_hash}, extra_pnginfo)]
    return [*(r.name for r in rows), *saved]


def lost(graph: Graph) -> dict[str, str]:
    """Nodes that keep a MODEL but not its erasure, and what to say there."""
    found = {}
    on = graph.below(graph.of(APPLY, ERASE), "MODEL")
    for node in on:
        kind = graph.kind(node)
        models = {k: link[0] for k, v in graph.inputs(node).items() if (link := graph.link(v)) and graph.runs(link) == "MODEL"}
        if host.saves(kind) and models:
            found[node] = "The file holds the MODEL without the erasure; share the deltas, or a LoRA of them by SepME Export."
        elif ("Merge" in kind or kind in ("ModelAdd", "ModelSubtract")) and any(models[k] in on for k in sorted(models)[1:]):
            found[node] = "A merge takes weights only, so this MODEL's erasure is lost; put SepME Apply behind the merge."
    return found
