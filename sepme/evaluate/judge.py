"""Who reads the pictures: the embedded model's classifier, or a CLIP model at hand. Both give labels and features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.classifier import load_classifier
from ..demo.world import SMALL
from ..errors import SepMEError
from ..hosts.loading import DEMO
from .suite import Suite


class Judge(Protocol):
    """Reads images ``(n, 3, h, w)`` in [-1, 1]; ``what`` says who it is, for the report."""

    what: str

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Whether each image shows the concept named beside it, ``(n,)`` bool."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """``(n, d)`` float32."""
        ...


class DemoJudge:
    what = "the embedded classifier (labels and features)"

    def __init__(self, suite: Suite) -> None:
        self.model = load_classifier(DEMO)

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        heads, labels = (torch.tensor(v) for v in zip(*map(SMALL.place_of, names), strict=True))
        return self.model.predict(images).gather(1, heads[:, None]).squeeze(1) == labels

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.model.features[:-1](images.float()), 2).flatten(1)


class ClipJudge:
    """Zero-shot among the suite's concepts of the same kind and "something else"."""

    def __init__(self, suite: Suite, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0][:100]
            raise SepMEError(f"{folder} holds no CLIP model with its tokenizer ({reason}); name one with --judge.") from None
        self.what = f"CLIP, zero-shot ({folder.name})"
        self.kinds, self.concepts = suite.kinds, suite.concepts
        self.texts: dict[str, Tensor] = {}
        for kind, names in suite.concepts.items():
            prompts = [suite.prompts(n)[-1] for n in names] + ["a photo of something else"]
            with torch.no_grad():
                out = self.model.get_text_features(**tokenizer(prompts, padding=True, truncation=True, return_tensors="pt"))
            self.texts[kind] = F.normalize(_tensor(out), dim=-1)

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        features = F.normalize(self.features(images), dim=-1)
        right = []
        for feature, name in zip(features, names, strict=True):
            kind = self.kinds[name]
            right.append(int((self.texts[kind] @ feature).argmax()) == self.concepts[kind].index(name))
        return torch.tensor(right)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        pixels = F.interpolate((images.float() + 1) / 2, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
        return _tensor(self.model.get_image_features(pixel_values=(pixels - mean) / std))


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output


def make_judge(suite: Suite, folder: Path | None) -> Judge:
    """The suite's judge.

    Raises:
        SepMEError: CLIP is asked for and no weights are given.
    """
    if suite.judge == "demo":
        return DemoJudge(suite)
    if folder is None:
        raise SepMEError("This suite is judged by CLIP; name a folder with its weights and tokenizer (--judge DIR).")
    return ClipJudge(suite, folder)


class Features(nn.Module):
    """A judge's features as torchmetrics wants an extractor."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.features(images)


def frechet(judge: Judge, images: Tensor, reference: Tensor) -> float:
    """Fréchet distance of the judge's features (FID's formula, by torchmetrics), of images ``(n, 3, h, w)`` in [-1, 1]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    width = judge.features(reference[:1]).shape[1]
    extractor = Features(judge)
    extractor.num_features = width  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=extractor, normalize=False, input_img_size=tuple(reference.shape[1:]))
    metric.set_dtype(torch.float64)
    metric.used_custom_model = True
    metric.update(reference, real=True)
    metric.update(images, real=False)
    return max(0.0, float(metric.compute()))


def perceptual(judge: Judge, images: Tensor, reference: Tensor) -> float:
    """Mean squared distance of normalised features: what stands for LPIPS where its weights are not at hand."""
    a, b = (F.normalize(judge.features(x), dim=-1) for x in (images, reference))
    return float((a - b).square().sum(-1).mean())
