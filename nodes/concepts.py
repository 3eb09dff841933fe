"""What is to be erased: concepts, one by one or as a book."""

from __future__ import annotations

from comfy_api.latest import io

from ..sepme.concepts import Concept, ConceptBook
from ..sepme.errors import SepMEError
from .sockets import CATEGORY, Concepts

CHAIN_TIP = "Concepts of an earlier node; these are added."


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text that are not blank."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def join(earlier: ConceptBook | None, book: ConceptBook) -> ConceptBook:
    """Two books as one."""
    if earlier is None:
        return book
    return ConceptBook(earlier.concepts + book.concepts, tuple(dict.fromkeys(earlier.preserve + book.preserve)))


class SepMEConcept(io.ComfyNode):
    """Node: one concept with its prompts and its anchor."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEConcept",
            display_name="SepME Concept",
            category=CATEGORY,
            description="A concept that can be erased: a style, a character, an object, a trademark. Chain several; each becomes its own "
            "delta, and each stays separable from all others in the chain.",
            inputs=[
                io.String.Input("name", default="", tooltip="Its name, as prompts call it: van gogh."),
                io.String.Input(
                    "prompts", multiline=True, default="", optional=True,
                    tooltip="Prompts that mean the concept, one per line. "
                    "Empty: the name in common phrases (a photo of ..., in the style of ...).",
                ),
                io.String.Input(
                    "anchor", default="", optional=True,
                    tooltip="What takes its place: 'a painting' for a painter. The closed form leads there, and G-CiRs starts from it. "
                    "Empty: nothing in particular, which erases less surely.",
                ),
                Concepts.Input("concepts", optional=True, tooltip=CHAIN_TIP),
            ],
            outputs=[Concepts.Output("concepts_out", display_name="CONCEPTS")],
        )  # fmt: skip

    @classmethod
    def execute(cls, name: str, prompts: str = "", anchor: str = "", concepts: ConceptBook | None = None) -> io.NodeOutput:
        return io.NodeOutput(join(concepts, ConceptBook((Concept(name, lines(prompts), anchor),))))


class SepMEConceptBook(io.ComfyNode):
    """Node: concepts and prompts that must not change, as a book."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SepMEConceptBook",
            display_name="SepME Concept Book",
            category=CATEGORY,
            description="Many concepts at once, as YAML or JSON; also prompts that must not change at all (preserve).",
            inputs=[
                io.String.Input(
                    "book", multiline=True,
                    default="concepts:\n  - van gogh\n  - name: picasso\n    prompts: [a painting by picasso]\npreserve: [a company logo]",
                    tooltip="concepts: a list of names, or of name, prompts, anchor. preserve: prompts that must not change.",
                ),
                Concepts.Input("concepts", optional=True, tooltip=CHAIN_TIP),
            ],
            outputs=[Concepts.Output("concepts_out", display_name="CONCEPTS")],
        )  # fmt: skip

    @classmethod
    def execute(cls, book: str, concepts: ConceptBook | None = None) -> io.NodeOutput:
        parsed = ConceptBook.loads(book)
        if parsed.preserve_file:
            raise SepMEError("A book in a workflow cannot name a preserve_file; write the prompts under 'preserve:'.")
        return io.NodeOutput(join(concepts, parsed))
