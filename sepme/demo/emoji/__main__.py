"""Train the emoji world's models: ``python -m sepme.demo.emoji [stage...]``, all in order by default; each goes on from its checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from .data import render_all

WORK = Path("runs/emoji-world")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["vae"])
    parser.add_argument("--work", type=Path, default=WORK, help="folder of packages, renders, checkpoints and the model")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    renders = render_all(arguments.work / "npm", arguments.work / "renders.npy")
    for stage in arguments.stages:
        if stage == "vae":
            from .vae import train_vae

            train_vae(arguments.work, renders)


if __name__ == "__main__":
    main()
