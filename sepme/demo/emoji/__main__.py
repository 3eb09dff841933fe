"""Train the emoji world's models: ``python -m sepme.demo.emoji [stage...]``.

Stages, in the order that they need each other: render, vae, latents, diffusion, classifier, export, flow, export-flow. Each goes on
from its checkpoint in ``--work``. ``--things`` and ``--steps`` may be raised later: training goes on with more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .captions import Words, build_words, load_words
from .classifiers import held_out, train_classifier
from .data import render_all
from .diffusion import Batches, Latents, train_diffusion
from .text import build_tokenizer, load_tokenizer
from .things import THINGS
from .vae import train_vae


class Training:
    """The stages as methods."""

    def __init__(self, work: Path, things: int, steps: int | None, until: int | None) -> None:
        self.work, self.things, self.steps, self.until = work, things, steps, until
        work.mkdir(parents=True, exist_ok=True)

    def renders(self) -> NDArray[np.uint8]:
        return render_all(self.work / "npm", self.work / "renders.npy")

    def words(self) -> Words:
        """Built once: training that goes on needs the same."""
        path = self.work / "words.json"
        if not path.exists():
            build_words(self.work / "npm").save(path)
        return load_words(path)

    def batches(self) -> Batches:
        latents, words, folder = Latents(self.work, self.renders(), self.things), self.words(), self.work / "tokenizer"
        if not (folder / "merges.txt").exists():
            build_tokenizer(folder, words.vocabulary)
        return Batches(latents, words, load_tokenizer(folder))

    def render(self) -> None:
        self.renders()

    def vae(self) -> None:
        train_vae(self.work, self.renders(), self.steps or 1500, until=self.until)

    def latents(self) -> None:
        Latents(self.work, self.renders(), self.things)

    def diffusion(self) -> None:
        train_diffusion(self.work, self.batches(), self.steps or 20000, until=self.until)

    def classifier(self) -> None:
        train_classifier(self.work, self.renders(), self.steps or 1600, until=self.until)
        print(held_out(self.work, self.renders()), flush=True)


def main() -> None:
    stages: dict[str, Callable[[Training], None]] = {
        "render": Training.render, "vae": Training.vae, "latents": Training.latents, "diffusion": Training.diffusion,
        "classifier": Training.classifier,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=list(stages), help=", ".join(stages))
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-world"), help="folder of packages, renders, checkpoints and models")
    parser.add_argument("--things", type=int, default=len(THINGS), help="how many of the things the generators are trained on")
    parser.add_argument("--steps", type=int, help="of the stage, instead of its own number")
    parser.add_argument("--until", type=int, help="stop at this step and go on another time")
    arguments = parser.parse_args()
    unknown = [s for s in arguments.stages if s not in stages]
    if unknown or not 1 <= arguments.things <= len(THINGS):
        parser.error(f"unknown stage {unknown[0]}" if unknown else f"--things is between 1 and {len(THINGS)}")
    training = Training(arguments.work, arguments.things, arguments.steps, arguments.until)
    for stage in arguments.stages:
        stages[stage](training)


if __name__ == "__main__":
    main()
