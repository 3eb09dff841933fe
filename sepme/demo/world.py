"""Drawing worlds: what can be drawn, how, and the captions that go with it.

SMALL is the embedded model's: six objects, six styles (and plain), four colours. ``large.py`` describes a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..evaluate.network import Network
from ..evaluate.suite import with_article
from .shapes import SHAPES
from .strokes import Canvas, cover, texture

SIZE = 64
OBJECTS = ("star", "circle", "square", "triangle", "cross", "heart")
STYLES = ("striped", "dotted", "checkered", "neon", "outlined", "framed")
PLAIN = len(STYLES)  # style index of a picture without a style
COLOURS = {"red": (0.90, 0.12, 0.12), "green": (0.10, 0.62, 0.22), "blue": (0.15, 0.28, 0.92), "yellow": (0.96, 0.80, 0.10)}

OBJECT_PROMPTS = ("{}", "a {}", "a picture of a {}", "a drawing of a {}", "one {}, centered")
STYLE_PROMPTS = ("{} style", "a {} picture", "a {} drawing", "in {} style", "a picture in {} style")
BOTH_PROMPTS = (
    "a {style} {thing}",
    "a {thing}, {style} style",
    "a drawing of a {thing} in {style} style",
    "a {style} picture of a {thing}",
)
# words around a caption that change nothing in the picture, so that the encoder learns to look past what it does not know
FILLER = (
    "high quality", "on a table", "best quality", "in the morning", "very detailed", "for my friend", "simple shapes",
    "4k", "with soft light", "made by hand", "on paper", "trending", "my favourite", "a lovely day", "near the window",
    "in the city", "masterpiece", "sharp focus", "by the sea", "and nothing else", "with a dog", "on the wall", "old photo",
    "professional", "of the year", "under the trees", "minimal", "bright colors", "in a house", "good composition",
)  # fmt: skip


class Drawing(NamedTuple):
    """What a picture shows: indices into a world's objects, styles (their number: plain) and colours."""

    object: int
    style: int
    colour: int


class Shares(NamedTuple):
    """How often a caption is empty, names an object and a style, an object, a style; the rest name a colour at most.

    ``coloured``: how often a caption that may name a colour does.
    """

    empty: float = 0.10
    both: float = 0.35
    object: float = 0.27
    style: float = 0.21
    coloured: float = 0.4


def choose(options: tuple[str, ...], generator: torch.Generator) -> str:
    """One of them at random; the only one without asking the generator."""
    return options[int(torch.randint(len(options), (1,), generator=generator))] if len(options) > 1 else options[0]


@dataclass(frozen=True)
class World:
    """A drawing world: one object in one style (or plain) and one colour per picture.

    Attributes:
        paint: draws a canvas in a style (``plain``: none), ``(3, 64, 64)``. radius: of figures, in pixels.
        colour_prompts: templates of captions that name nothing but a colour.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    colours: Mapping[str, tuple[float, float, float]]
    paint: Callable[[Canvas, str], Tensor]
    radius: float = 20.5
    colour_prompts: tuple[str, ...] = ("a {} picture",)
    shares: Shares = field(default_factory=Shares)

    @property
    def words(self) -> tuple[str, ...]:
        """Names of everything that can be asked for."""
        return (*self.objects, *self.styles, *self.colours)

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """What a classifier may read: objects, styles (with plain) and colours."""
        return self.objects, (*self.styles, "plain"), tuple(self.colours)

    @property
    def heads(self) -> tuple[int, int, int]:
        """How many objects, styles (with plain) and colours there are."""
        return len(self.objects), len(self.styles) + 1, len(self.colours)

    def place_of(self, name: str) -> tuple[int, int]:
        """(head, class) of a word: head 0 objects, 1 styles, 2 colours."""
        for head, names in enumerate((self.objects, self.styles, tuple(self.colours))):
            if name in names:
                return head, names.index(name)
        raise KeyError(name)

    def together(self, one: str, other: str, which: int) -> str:
        """A prompt that holds two words of different heads; ``which`` counts through the templates."""
        (a, first), (b, second) = sorted((self.place_of(n)[0], n) for n in (one, other))
        if (a, b) == (0, 1):
            text = BOTH_PROMPTS[which % len(BOTH_PROMPTS)].format(thing=first, style=second)
        elif (a, b) == (0, 2):
            text = OBJECT_PROMPTS[which % len(OBJECT_PROMPTS)].format(f"{second} {first}")
        else:
            text = f"{STYLE_PROMPTS[which % len(STYLE_PROMPTS)].format(first)}, {second}"
        return with_article(text)

    @cached_property
    def filler(self) -> tuple[str, ...]:
        """Filler that holds no word of this world."""
        return tuple(f for f in FILLER if not set(f.split()) & set(self.words))

    def draw(self, scene: Drawing, generator: torch.Generator) -> Tensor:
        """Draw one scene with a jittered place, size, angle and tone.

        Returns:
            image ``(3, 64, 64)`` float32 in [0, 1].
        """
        jitter = (torch.rand(6, generator=generator) * 2 - 1).tolist()
        cx, cy = 31.5 + 2 * jitter[0], 31.5 + 2 * jitter[1]
        radius, angle = self.radius + 1.5 * jitter[2], 0.08 * jitter[3]
        py, px = torch.meshgrid(torch.arange(SIZE, dtype=torch.float32), torch.arange(SIZE, dtype=torch.float32), indexing="ij")
        u, v = (px - cx) / radius, -(py - cy) / radius
        x, y = u * math.cos(angle) - v * math.sin(angle), u * math.sin(angle) + v * math.cos(angle)
        canvas = Canvas(
            px, py, x, y,
            distance=SHAPES[self.objects[scene.object]](x, y) * radius,
            colour=torch.tensor(list(self.colours.values())[scene.colour])[:, None, None],
            tone=0.91 + 0.04 * jitter[4],
            ink=0.45 + 0.04 * jitter[5],
        )  # fmt: skip
        return self.paint(canvas, self.styles[scene.style] if scene.style < len(self.styles) else "plain")

    def random_scene(self, generator: torch.Generator) -> Drawing:
        """A scene drawn uniformly; styles and plain are equally likely."""
        return Drawing(*(int(torch.randint(h, (1,), generator=generator)) for h in self.heads))

    def random_caption(self, generator: torch.Generator) -> tuple[str, Drawing]:
        """A caption and a scene that it describes.

        What a caption omits is drawn at random, except the style, which is then plain; the empty caption shows anything.
        """
        scene, plain, share = self.random_scene(generator), len(self.styles), self.shares
        kind, coloured, filled = torch.rand(3, generator=generator).tolist()
        if kind < share.empty:
            return "", scene
        colour = list(self.colours)[scene.colour] if coloured < share.coloured else ""
        thing = f"{colour} {self.objects[scene.object]}".lstrip()
        styled = scene._replace(style=scene.style % plain)
        style = self.styles[styled.style]
        if kind < share.empty + share.both:
            text, scene = choose(BOTH_PROMPTS, generator).format(thing=thing, style=style), styled
        elif kind < share.empty + share.both + share.object:
            text, scene = choose(OBJECT_PROMPTS, generator).format(thing), scene._replace(style=plain)
        elif kind < share.empty + share.both + share.object + share.style:
            text, scene = choose(STYLE_PROMPTS, generator).format(style), styled
            text = f"{text}, {colour}".rstrip(", ")
        else:
            prompts = self.colour_prompts if colour else ("a picture",)
            text, scene = choose(prompts, generator).format(colour), scene._replace(style=plain)
        if filled < 0.15:
            text = f"{text}, {choose(self.filler, generator)}"
        elif filled < 0.2:
            text = f"{choose(self.filler, generator)}, {text}"
        return with_article(text), scene


def _paint(canvas: Canvas, style: str) -> Tensor:
    if style == "neon":
        glow = torch.exp(-(canvas.distance + 1.5).abs() / 3.5)
        core = cover((canvas.distance + 1.5).abs() - 1.5)
        return (0.06 + glow * canvas.colour + 0.5 * core * (1 - canvas.colour)).clamp(0, 1)
    fill = cover((canvas.distance + 3).abs() - 3) if style == "outlined" else cover(canvas.distance)
    return texture(canvas, style) * (1 - fill) + canvas.colour * fill


SMALL = World(OBJECTS, STYLES, COLOURS, _paint)


def classifier_accuracy(network: Network, world: World, count: int = 1050) -> dict[str, float]:
    """Accuracy on freshly drawn pictures that training never saw, by head."""
    generator = torch.Generator().manual_seed(987_654)
    total = world.heads
    scenes = [Drawing(i % total[0], i // total[0] % total[1], i % total[2]) for i in range(count)]
    images = torch.stack([world.draw(s, generator) for s in scenes]) * 2 - 1
    right = network.predict(images) == torch.tensor(scenes)
    return dict(zip(("object", "style", "colour"), right.float().mean(0).tolist(), strict=True))
