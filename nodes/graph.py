"""A prompt in API format as a graph: what it says before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Prompt = dict[str, dict[str, Any]]
Link = tuple[str, int]


class Graph:
    """The nodes of a prompt and what runs along their wires; a node or link that makes no sense is passed over.

    Args:
        prompt: ``{id: {"class_type": kind, "inputs": {name: value or [id, output]}}}``; it may come from anybody.
        outputs: types of a kind's outputs.
    """

    def __init__(self, prompt: Any, outputs: Callable[[str], Sequence[str]]) -> None:
        given = prompt.items() if isinstance(prompt, dict) else ()
        self.nodes: Prompt = {k: n for k, n in given if isinstance(n, dict) and isinstance(n.get("inputs"), dict) and _kind(n)}
        self.outputs = {kind: outputs(kind) for kind in {_kind(n) for n in self.nodes.values()}}

    def kind(self, node: str) -> str:
        """The class of a node, as ComfyUI registers it."""
        return _kind(self.nodes[node])

    def of(self, *kinds: str) -> list[str]:
        """Nodes of these kinds."""
        return [node for node in self.nodes if self.kind(node) in kinds]

    def inputs(self, node: str) -> dict[str, Any]:
        """Inputs of a node by name: values, or links ``[node, output]``."""
        inputs: dict[str, Any] = self.nodes[node]["inputs"]
        return inputs

    def title(self, node: str) -> str:
        """What the page calls a node, where it says so."""
        meta = self.nodes[node].get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        return title if isinstance(title, str) and title else self.kind(node)

    def link(self, value: Any) -> Link | None:
        """Where an input comes from; None: its value stands in the prompt."""
        good = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
        return (value[0], value[1]) if good and value[0] in self.nodes else None

    def runs(self, link: Link) -> str:
        """The type of what runs along a link; ``*`` when it cannot be told."""
        types = self.outputs[self.kind(link[0])]
        return types[link[1]] if 0 <= link[1] < len(types) else "*"

    def above(self, nodes: Iterable[str]) -> dict[str, None]:
        """These nodes and all that they depend on, nearest first."""
        return self._closure(nodes, lambda n: (link[0] for v in self.inputs(n).values() if (link := self.link(v))))

    def below(self, nodes: Iterable[str], kind: str = "") -> dict[str, None]:
        """These nodes and all that depend on them, along links of one type or of all."""
        users: dict[str, list[str]] = {}
        for node in self.nodes:
            for value in self.inputs(node).values():
                link = self.link(value)
                if link and (not kind or self.runs(link) == kind):
                    users.setdefault(link[0], []).append(node)
        return self._closure(nodes, lambda n: users.get(n, ()))

    @staticmethod
    def _closure(nodes: Iterable[str], further: Callable[[str], Iterable[str]]) -> dict[str, None]:
        found = dict.fromkeys(nodes)
        rest = list(found)
        while rest:
            new = [n for n in further(rest.pop(0)) if n not in found]
            found.update(dict.fromkeys(new))
            rest += dict.fromkeys(new)
        return found

    def texts(self, node: str) -> Iterator[str]:
        """The texts that a node is given: those that stand in it, and those of the text nodes before it; ours hand out no tags."""

        def before(n: str) -> Iterator[str]:
            links = (link for value in self.inputs(n).values() if (link := self.link(value)))
            return (up for up, out in links if self.runs((up, out)) in ("STRING", "*") and not self.kind(up).startswith("SepME"))

        for n in self._closure([node], before):
            yield from (value for value in self.inputs(n).values() if isinstance(value, str))

    def used(self, node: str) -> set[str]:
        """Types of the outputs of a node that something is connected to."""
        links = (link for n in self.nodes for value in self.inputs(n).values() if (link := self.link(value)))
        return {self.runs(link) for link in links if link[0] == node}


def handed_on(hidden: Any, output: int) -> bool:
    """Whether something is connected to an output of the node that runs; it has hidden inputs ``prompt`` and ``unique_id``."""
    graph = _running(hidden)
    return any(graph.link(v) == (hidden.unique_id, output) for n in graph.nodes for v in graph.inputs(n).values())


def saved(hidden: Any) -> bool:
    """Whether the deltas of the node that runs become files."""
    graph = _running(hidden)
    return any(graph.kind(n) in ("SepMESaveDeltas", "SepMEExport") for n in graph.below([hidden.unique_id] if graph.nodes else []))


def _running(hidden: Any) -> Graph:
    return Graph(hidden.prompt if hidden else None, lambda kind: ())


def _kind(node: dict[str, Any]) -> str:
    kind = node.get("class_type")
    return kind if isinstance(kind, str) else ""
