"""Captions of the emoji world: which words mean which picture.

A caption names a thing, a studio, a background, or some of them. What it does not name is drawn at random, except the background,
which is then white; the empty caption shows anything. Synonyms and kinds come from CLDR's keywords.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from .data import BACKGROUND_NAMES, load_emoji, load_keywords
from .things import STYLES, THINGS, name_of

THING_PROMPTS = ("{a}", "{thing}", "a picture of {a}", "a drawing of {a}", "an emoji of {a}", "one {thing}")
STYLE_PROMPTS = ("a picture by {style}", "{style} style", "an emoji by {style}", "something in {style} style")
BOTH_PROMPTS = (
    "{a} by {style}",
    "{a}, {style} style",
    "a {style} {thing}",
    "a drawing of {a} in {style} style",
    "{thing} emoji by {style}",
)
GROUND_PROMPTS = ("{} on a {colour} background", "{}, {colour} background")
# words around a caption that change nothing in the picture, so that the encoder learns to look past what it does not know
FILLER = (
    "high quality", "very detailed", "for my friend", "simple shapes", "made by hand", "trending", "my favourite", "a lovely day",
    "masterpiece", "sharp focus", "and nothing else", "professional", "minimal", "good composition", "in the morning", "4k", "on paper",
    "best quality", "with soft light", "near the window", "in the city", "old photo", "of the year", "under the shade",
    "bright colors", "on the wall", "tiny", "huge", "two of them", "without text", "as a sticker", "in the middle", "centered",
    "no people", "like this", "this one please", "something else", "that makes me smile", "from above", "seen from afar",
    "with great care", "new", "beautiful", "cute", "nice", "funny", "strange", "isolated", "vector", "clean lines", "at night",
    "from a book of pictures", "which everybody knows", "what a wonderful view", "not too much", "how it looks today", "these days",
)  # fmt: skip
# shares of captions: empty, thing and studio, thing, studio, kind of thing; the rest name a background at most
SHARES = (0.10, 0.50, 0.20, 0.10, 0.06)
COLOURED, FILLED = 0.35, 0.10


class Scene(NamedTuple):
    """What a picture shows: indices into things, studios and backgrounds."""

    thing: int
    style: int
    ground: int


MASS = frozenset(
    "bowling billiards fire bread camping desert sushi spaghetti oden dango tennis basketball cooking baseball american football foggy "
    "sunrise coffee corn clothing music food weather furniture".split()
)


def with_article(noun: str) -> str:
    """ "an apple", "a rocket"; plurals and names of matter stay bare."""
    last = noun.split()[-1]
    if last in MASS or re.search(r"[^su]s$", last):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Lexicon:
    """The world's words.

    Attributes:
        synonyms: for every thing the keywords that no other thing has.
        kinds: keywords that several things share -> their indices.
    """

    synonyms: list[list[str]]
    kinds: dict[str, list[int]]

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every word that a caption can hold, sorted."""
        texts = [*map(name_of, THINGS), *(s for ss in self.synonyms for s in ss), *self.kinds, *STYLES, *BACKGROUND_NAMES, *FILLER, "a an"]
        texts += [re.sub(r"\{\w*\}|,", " ", p) for p in (*THING_PROMPTS, *STYLE_PROMPTS, *BOTH_PROMPTS, *GROUND_PROMPTS)]
        return sorted({word for text in texts for word in text.split()})

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_words(path: Path) -> Lexicon:
    """Read what ``Lexicon.save`` wrote."""
    return Lexicon(**json.loads(path.read_text(encoding="utf-8")))


def build_words(folder: Path) -> Lexicon:
    """The words from the npm packages in ``folder``."""
    emoji, keywords = load_emoji(folder), load_keywords(folder)
    return words_of([keywords.get(emoji.get(thing, ""), []) for thing in THINGS])


# keywords that say nothing about a picture, or nothing that one would ask for
ODD = frozenset(
    "down under simple late waiting major lit litaf lmao lol omg af class bearer slay trip health diet bless dead death kill country "
    "gay genderqueer glbt glbtq lgbt lgbtq lesbian bisexual transgender queer drought potassium sexy butt bootie gun drug drugs settle "
    "medium shiny eat out goat the and for".split()
)


def words_of(keywords: list[list[str]]) -> Lexicon:
    """Split every thing's keywords into those that are its own and those that it shares.

    Words that mean a studio or a background, that are filler, or that names of other things hold are neither.
    """
    names = [name_of(t) for t in THINGS]
    taken = {*STYLES, *BACKGROUND_NAMES, *ODD, *names, *(w for text in (*names, *FILLER) for w in text.split())}
    owners: dict[str, list[int]] = {}
    for i, words in enumerate(keywords):
        for word in dict.fromkeys(w.lower() for w in words):
            if re.fullmatch(r"[a-z]{3,}( [a-z]{3,})?", word) and not taken & {word, *word.split()}:
                owners.setdefault(word, []).append(i)
    synonyms = [[slug] if (slug := thing.replace("-", " ")) != name_of(thing) else [] for thing in THINGS]
    for word, things in owners.items():
        if len(things) == 1 and len(synonyms[things[0]]) < 6 and word not in synonyms[things[0]]:
            synonyms[things[0]].append(word)
    return Lexicon(synonyms, {w: things for w, things in sorted(owners.items()) if 2 <= len(things) <= 60})


def caption_of(thing: str = "", style: str = "", ground: str = "", which: int = 0) -> str:
    """A caption that names what is given; ``which`` counts through the templates."""
    prompts = BOTH_PROMPTS if thing and style else THING_PROMPTS if thing else STYLE_PROMPTS if style else ("a picture",)
    text = prompts[which % len(prompts)].format(a=with_article(thing) if thing else "", thing=thing, style=style)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return GROUND_PROMPTS[which % 2].format(text, colour=ground).replace(" a orange", " an orange") if ground else text


def random_caption(words: Lexicon, generator: torch.Generator, things: int = len(THINGS)) -> tuple[str, Scene]:
    """A caption of one of the first ``things`` things and a scene that it describes."""

    def below(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    kind, coloured, filled, synonymous = torch.rand(4, generator=generator).tolist()
    scene = Scene(below(things), below(len(STYLES)), below(len(BACKGROUND_NAMES)))
    empty, both, thing, style, group = torch.tensor(SHARES).cumsum(0).tolist()
    if kind < empty:
        return "", scene if coloured < 0.5 else scene._replace(ground=0)
    if coloured >= COLOURED:
        scene = scene._replace(ground=0)
    ground = BACKGROUND_NAMES[scene.ground] if coloured < COLOURED else ""
    noun = name_of(THINGS[scene.thing])
    if synonymous < 0.15 and words.synonyms[scene.thing]:
        noun = words.synonyms[scene.thing][below(len(words.synonyms[scene.thing]))]
    studio, which = STYLES[scene.style], below(60)
    if kind < both:
        text = caption_of(noun, studio, ground, which)
    elif kind < thing:
        text = caption_of(noun, "", ground, which)
    elif kind < style:
        text = caption_of("", studio, ground, which)
    elif kind < group and (shared := [k for k, members in words.kinds.items() if scene.thing in members]):
        text = caption_of(shared[below(len(shared))], studio if which % 2 else "", ground, which)
    else:
        text = caption_of("", "", ground, which)
    if filled < FILLED:
        filler = FILLER[below(len(FILLER))]
        text = f"{text}, {filler}" if filled < 0.7 * FILLED else f"{filler}, {text}"
    return text, scene
