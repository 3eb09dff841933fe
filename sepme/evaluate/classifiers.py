"""Classifiers that read pictures: the embedded model's own, or a CLIP model at hand. Both give labels and features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SepMEError
from ..files import first_line
from ..hosts.loading import DEMO
from .network import FILE, Network
from .suite import Suite


class Classifier(Protocol):
    """Reads images ``(n, 3, h, w)`` in [-1, 1].

    Attributes:
        what: who it is, for the report.
        inception: whether FID's own network is at hand.
        lpips: torchmetrics' LPIPS, if at hand.
    """

    what: str
    inception: bool
    lpips: Any

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Whether each image shows the concept named beside it, ``(n,)`` bool."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """``(n, d)`` float32."""
        ...


class EmbeddedClassifier:
    """The one that lies beside a model whose pictures it was trained to read; the embedded model has one."""

    inception, lpips = False, None

    def __init__(self, folder: Path = DEMO) -> None:
        self.model = Network.load(folder)
        self.what = "the embedded classifier" if folder == DEMO else f"the classifier in {folder.name}"

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        heads, labels = (torch.tensor(v) for v in zip(*map(self.model.place_of, names), strict=True))
        return self.model.predict(images).gather(1, heads[:, None]).squeeze(1) == labels

    def knows(self, name: str) -> bool:
        """Whether it has a label of this name."""
        return any(name in names for names in self.model.labels)

    def features(self, images: Tensor) -> Tensor:
        return self.model.embed(images)


class ClipClassifier:
    """Zero-shot among the suite's concepts and neighbours of the same kind and "something else"."""

    def __init__(self, suite: Suite, folder: Path, device: Any) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().to(device)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise SepMEError(f"{folder} holds no CLIP model with its tokenizer ({first_line(error)}); name one with --judge.") from None
        self.what, self.inception, self.lpips = f"CLIP, zero-shot ({folder.name})", _inception(), _lpips()
        self.kinds = suite.kinds
        self.labels = {kind: (*names, *suite.neighbours.get(kind, ())) for kind, names in suite.concepts.items()}
        self.texts: dict[str, Tensor] = {}
        for kind, names in self.labels.items():
            prompts = [suite.prompts(n)[-1] for n in names] + ["a photo of something else"]
            with torch.no_grad():
                out = self.model.get_text_features(**tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device))
            self.texts[kind] = F.normalize(_tensor(out), dim=-1).cpu()

    def correct(self, images: Tensor, names: Sequence[str]) -> Tensor:
        features = F.normalize(self.features(images), dim=-1)
        right = []
        for feature, name in zip(features, names, strict=True):
            kind = self.kinds[name]
            right.append(int((self.texts[kind] @ feature).argmax()) == self.labels[kind].index(name))
        return torch.tensor(right)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        pixels = F.interpolate((images.float() + 1) / 2, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
        return _tensor(self.model.get_image_features(pixel_values=((pixels - mean) / std).to(self.model.device))).float().cpu()


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output


def make_classifier(suite: Suite, folder: Path | None, device: Any, model: Path = DEMO) -> Classifier:
    """The suite's classifier.

    Args:
        folder: CLIP's weights and tokenizer.
        model: the folder of the model that draws; a classifier that lies there is taken, else the embedded model's.

    Raises:
        SepMEError: CLIP is asked for and no weights are given; or the classifier beside the model has no label for one of the concepts.
    """
    if suite.judge == "demo":
        classifier = EmbeddedClassifier(model if (model / FILE).is_file() else DEMO)
        unknown = [name for name in suite.kinds if not classifier.knows(name)]
        if unknown:
            raise SepMEError(f"Pictures of {unknown[0]!r} cannot be told apart by {classifier.what}; choose a suite for this model.")
        return classifier
    if folder is None:
        raise SepMEError("This suite is classified by CLIP; name a folder with its weights and tokenizer (--judge DIR).")
    return ClipClassifier(suite, folder, device)


class Features(nn.Module):
    """A classifier's features as torchmetrics wants an extractor."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


def frechet(classifier: Classifier, images: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """FID's formula, by torchmetrics, of sets of images ``(n, 3, h, w)`` in [-1, 1], a piece at a time.

    On Inception's features if they are at hand, else on the classifier's; nan for fewer than two images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for real, pieces in ((True, reference), (False, images)):
        for piece in pieces:
            if metric is None and classifier.inception:
                metric = FrechetInceptionDistance(feature=2048, normalize=True).set_dtype(torch.float64)
            elif metric is None:
                extractor = Features(classifier)
                extractor.num_features = classifier.features(piece[:1]).shape[1]  # type: ignore[assignment]
                metric = FrechetInceptionDistance(feature=extractor, normalize=False, input_img_size=tuple(piece.shape[1:]))
                metric.set_dtype(torch.float64)
                metric.used_custom_model = True
            metric.update((piece.float() + 1) / 2 if classifier.inception else piece, real=real)
    assert metric is not None
    if min(metric.real_features_num_samples, metric.fake_features_num_samples) < 2:
        return float("nan")
    return max(0.0, float(metric.compute()))


@torch.no_grad()
def perceptual(classifier: Classifier, images: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Mean LPIPS if its weights are at hand, else mean squared distance of the classifier's normalised features."""
    total, count = 0.0, 0
    for pair in zip(images, reference, strict=True):
        if classifier.lpips is not None:
            total += len(pair[0]) * float(classifier.lpips(*(x.float() for x in pair)))
        else:
            a, b = (F.normalize(classifier.features(x), dim=-1) for x in pair)
            total += float((a - b).square().sum())
        count += len(pair[0])
    return total / count


def measures(classifier: Classifier) -> str:
    """Which distances these are, for the report."""
    fid = "Inception's features (FID)" if classifier.inception else "the classifier's features, in place of Inception's"
    distance = "LPIPS (AlexNet)" if classifier.lpips else "squared, of the classifier's normalised features, in place of LPIPS"
    return f"Fréchet distance on {fid}; distance: {distance}."


def _inception() -> bool:
    """Whether FID's own network is at hand: torch-fidelity, and its weights in torch's hub folder; nothing is downloaded."""
    if find_spec("torch_fidelity") is None:
        return False
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return _at_hand(URL_INCEPTION_V3)


def _lpips() -> Any:
    """LPIPS by torchmetrics, if AlexNet's weights lie in torch's hub folder; None otherwise."""
    if find_spec("torchvision") is None:
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    return LearnedPerceptualImagePatchSimilarity(net_type="alex") if _at_hand(AlexNet_Weights.DEFAULT.url) else None


def _at_hand(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file()
