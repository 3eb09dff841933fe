"""The example of a model that is no Stable Diffusion, with little training: what it shows holds from the start."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepme import Composition, Concept, ConceptBook, EvaluationHost, KVProjector, Planner, SepMEError, TrainOptions, make_delta
from sepme.apply.toggles import strengths
from sepme.evaluate.run import Run
from sepme.evaluate.suite import parse
from sepme.model.schedule import Sampling, runs

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_of_ones_own(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(str(tmp_path / "points.png"), steps=40)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{f}: {'changed' if f == 'circle' else 'bit for bit as before'}; given back: bit for bit" for f in example.FIGURES]
    assert (tmp_path / "points.png").stat().st_size > 1000


class Nearest:
    """Sees the point of a picture on the figure that it is nearest to."""

    what, inception, lpips = "the nearest figure", False, None

    def __init__(self, figures: dict[str, Tensor]) -> None:
        self.figures = figures

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        at = images[:, :2, 0, 0] * 3
        distances = {name: torch.cdist(at, points).amin(1) for name, points in self.figures.items()}
        return torch.tensor([min(distances, key=lambda f: float(distances[f][i])) == name for i, name in enumerate(names)])


def test_it_is_evaluated_too(example: Any, tmp_path: Path) -> None:
    """A host that is none of ours and draws points runs through a suite: what is spared or restored is the same bit for bit."""
    encoder, trained = example.Words(), example.train(example.Words(), steps=40)

    class Host(example.PointDenoiser):  # type: ignore[misc]
        encode = staticmethod(encoder.encode)

        def attention_layers(self) -> dict[str, Any]:
            """Under names that a file can hold."""
            layers = super().attention_layers().values()
            return {f"input_blocks.{i + 1}.1.transformer_blocks.0.attn2": layer for i, layer in enumerate(layers)}

        def generate(
            self, prompts: Sequence[str], seeds: Sequence[int], composition: Composition | None = None, toggles: Any = None, *,
            negative: str = "", steps: int = 4, guidance: float = 1.0, gate: bool = True, latents_only: bool = False,
        ) -> Tensor:  # fmt: skip
            empty, context = self.encode([negative] * len(prompts)).context, self.encode(prompts).context
            table = strengths([{}] * len(prompts) + [toggles or {}] * len(prompts), composition.deltas) if composition else None
            projector = KVProjector(self.attention_layers(), composition or Composition(()), gate=gate)
            with torch.no_grad(), projector.attached(table):
                *_, last = runs(self, self.schedule, self.latents(seeds), context, empty, None, Sampling(steps, guidance))
            return last if latents_only else self.decode(last)

        def decode(self, latents: Tensor) -> Tensor:
            """A point's place as two channels of one colour, 8 x 8."""
            return torch.cat([latents / 3, torch.zeros(len(latents), 1)], 1).clamp(-1, 1)[:, :, None, None].expand(-1, -1, 8, 8)

    host: EvaluationHost = Host(trained.model)
    templates = {"trained": ["{}", "a {}"], "unseen": ["one {}"]}
    suite = parse(
        {
            "name": "points", "judge": "demo", "concepts": {"round": ["circle", "triangle"], "straight": ["square", "line"]},
            "templates": {"round": templates, "straight": templates}, "both": ["a {round} {straight}"], "unrelated": ["blue"],
            "images": 2, "steps": 4, "guidance": 1.0, "methods": ["sepme_closed_form", "uce"], "attack": {"concepts": 0},
            "resurgence": {"steps": 1, "batch": 2}, "toggles": 2, "parts": ["methods", "toggles"],
        },
        "points",
    )  # fmt: skip
    figures = {f: example.points(f, 50, torch.Generator().manual_seed(0)) for f in example.FIGURES}
    metrics = Run(host, suite, tmp_path, classifier=Nearest(figures))()
    ours = metrics["methods"]["sepme_closed_form"]
    assert ours["restored_bit_identical"] == ours["untouched_bit_identical"] == 1
    assert metrics["methods"]["uce"]["restored_bit_identical"] < 1
    assert metrics["toggles"]["sepme_closed_form"]["weights_bit_identical"]
    assert "attack_success" not in ours
    assert "the nearest figure" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_file_holds_known_names_only(example: Any, tmp_path: Path) -> None:
    denoiser, book = example.train(example.Words(), steps=1), ConceptBook((Concept("circle", ("circle",)),))
    delta = make_delta(Planner(example.Words(), book), "circle", denoiser, TrainOptions(objective="closed-form", edit="layers"))
    with pytest.raises(SepMEError, match=r"under LDM's names, as .*'attention\.0\.to_k' is none"):
        delta.save(tmp_path / "circle.safetensors")
    assert not list(tmp_path.iterdir())
