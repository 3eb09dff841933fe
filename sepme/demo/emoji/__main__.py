"""Train the emoji world's models: ``python -m sepme.demo.emoji [stage...]``, all stages by default.

Each goes on from its checkpoint in ``--work``, and does nothing if it is done. ``--steps`` may be raised later: training goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from .captions import Lexicon, build_words, load_words
from .classifiers import build_classifier, held_out, train_classifier
from .data import render_all
from .diffusion import Batches, Latents, train_diffusion
from .export import export, export_flow, write_json
from .flow import train_flow
from .pictures import Painter, flow_painter, originals, read, read_accuracy, sheet, unet_painter
from .stage import load_stage
from .text import build_tokenizer, load_tokenizer, train_text
from .things import THINGS
from .vae import train_vae

SHIPPED = 50  # of the things are what the embedded model knows
# the denoiser sees few things first: (up to this step, the first so many things)
CURRICULUM = ((1000, 20), (3000, 50), (9000, 100), (10**9, len(THINGS)))


class Stages:
    """The stages as methods, and what they share."""

    def __init__(self, work: Path, things: int = SHIPPED, steps: int | None = None, until: int | None = None) -> None:
        self.work, self.things, self.steps, self.until = work, things, steps, until
        work.mkdir(parents=True, exist_ok=True)

    def renders(self) -> NDArray[np.uint8]:
        """The drawings, rendered once."""
        return render_all(self.work / "npm", self.work / "renders.npy")

    def words(self) -> Lexicon:
        """Built once: training that goes on needs the same."""
        path = self.work / "words.json"
        if not path.exists():
            build_words(self.work / "npm").save(path)
        return load_words(path)

    def tokenizer(self) -> CLIPTokenizer:
        """Built once."""
        folder = self.work / "tokenizer"
        if not (folder / "merges.txt").exists():
            build_tokenizer(folder, self.words().vocabulary)
        return load_tokenizer(folder)

    def batches(self, things: int) -> Batches:
        """Captions and latents of the first ``things`` things."""
        return Batches(Latents(self.work, self.renders(), things), self.words(), self.tokenizer())

    def render(self) -> None:
        """Stage: render the drawings."""
        self.renders()

    def vae(self) -> None:
        """Stage: train the autoencoder."""
        train_vae(self.work, self.renders(), self.steps or 1700, until=self.until)

    def classifier(self) -> None:
        """Stage: train the classifier and print its accuracy."""
        renders = self.renders()[: self.things]
        train_classifier(self.work, renders, self.steps or 3000, until=self.until)
        accuracy = held_out(self.work, renders)
        write_json(self.work / "classifier.json", accuracy)
        print(f"classifier on new placements: {accuracy}", flush=True)

    def text(self) -> None:
        """Stage: train the text encoder to tell captions apart."""
        train_text(self.work, self.words(), self.tokenizer(), self.steps or 600, until=self.until)

    def diffusion(self) -> None:
        """Stage: train denoiser and text encoder, few things first."""
        last = self.until or 10**9
        for end, things in CURRICULUM:
            train_diffusion(self.work, self.batches(min(things, self.things)), self.steps or 7200, until=min(end, last))
            if end >= last:
                break

    def flow(self) -> None:
        """Stage: train the flow transformer."""
        train_flow(self.work, self.batches(self.things), self.steps or 4400, until=self.until)

    def export(self) -> None:
        """Stage: write both models as folders."""
        export(self.work, self.work / "model")
        export_flow(self.work, self.work / "flow")

    def evaluate(self) -> None:
        """Stage: print accuracies and write sheets of both models."""
        self._evaluate("diffusion", unet_painter)
        self._evaluate("flow", flow_painter)

    def _evaluate(self, stage: str, painter: Callable[[Path, int, float], Painter], steps: int = 12) -> None:
        """Print the share that is read as asked, and draw sheets of ten things beside the studios' own drawings."""
        if not (self.work / f"{stage}.pt").exists():
            return
        known = Latents.count(self.work)
        things = min(self.things, known)
        painters = {guidance: painter(self.work, steps, guidance) for guidance in (3.0, 8.0)}
        chosen = list(range(0, things, max(1, things // 10)))[:10]
        sheet(painters[3.0], chosen).save(self.work / f"{stage}.png")
        originals(self.renders(), chosen).save(self.work / "originals.png")
        if (self.work / "classifier.pt").exists():
            classifier = load_stage(build_classifier(known), self.work, "classifier", "classifier")
            for guidance, paint in painters.items():
                shares = read_accuracy(*read(paint, classifier, things, 180))
                print(f"{stage}, {steps} steps, guidance {guidance}, {things} things: read {shares}", flush=True)


def main() -> None:
    """Entry point of ``python -m sepme.demo.emoji``."""
    stages: dict[str, Callable[[Stages], None]] = {
        "render": Stages.render, "vae": Stages.vae, "classifier": Stages.classifier, "text": Stages.text,
        "diffusion": Stages.diffusion, "flow": Stages.flow, "export": Stages.export, "evaluate": Stages.evaluate,
    }  # fmt: skip
    parser = argparse.ArgumentParser(prog="python -m sepme.demo.emoji", description=__doc__)
    parser.add_argument("stages", nargs="*", default=list(stages), help=", ".join(stages))
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-world"), help="folder of packages, renders, checkpoints and models")
    parser.add_argument("--things", type=int, default=SHIPPED, help="how many of the things the models are trained on at most")
    parser.add_argument("--steps", type=int, help="of the stage, instead of its own number")
    parser.add_argument("--until", type=int, help="stop at this step and go on another time")
    arguments = parser.parse_args()
    unknown = [s for s in arguments.stages if s not in stages]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}; there are {', '.join(stages)}")
    if not 1 <= arguments.things <= len(THINGS):
        parser.error(f"--things is between 1 and {len(THINGS)}")
    training = Stages(arguments.work, arguments.things, arguments.steps, arguments.until)
    for stage in arguments.stages:
        stages[stage](training)


if __name__ == "__main__":
    main()
