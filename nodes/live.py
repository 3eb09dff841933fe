"""What the page shows of training while it runs: the loss of every step, and now and then what the concept's prompt draws."""

from __future__ import annotations

import base64
import io
import time
from types import SimpleNamespace
from typing import Any

import torch

from ..sepme.model.protocols import TextEncoder
from ..sepme.model.schedule import GLANCE, runs
from ..sepme.train import Progress
from . import host

EVERY = 2.0  # seconds between pictures, and at least ten times as long as one takes


class Live:
    """Messages ``sepme.train`` of one node.

    Args:
        node: its id.
        encoder, denoiser: those that training uses.
    """

    def __init__(self, node: Any, encoder: TextEncoder, denoiser: host.HostDenoiser) -> None:
        self.node, self.encoder, self.denoiser = node, encoder, denoiser
        self.decode = denoiser.preview()
        self.next = 0.0
        self.encoded: dict[str, Any] = {}

    def note(self, text: str, concept: str, steps: int) -> None:
        """Tell the page something before the first step."""
        host.tell_page("sepme.train", {"node": self.node, "concept": concept, "step": 0, "steps": steps, "note": text})

    def step(self, step: Progress, prompt: str) -> None:
        """Tell the page of a step; ``prompt`` is sampled when it is time for a picture. No generator of the training is touched."""
        data = {"node": self.node, "concept": step.concept, "step": step.step, "steps": step.steps, "loss": step.loss}
        if self.decode is not None and time.monotonic() >= self.next:
            start = time.monotonic()
            data["sample"] = self.sample(step, prompt)
            now = time.monotonic()
            self.next = now + max(EVERY, 10 * (now - start))
        host.tell_page("sepme.train", data)

    @torch.no_grad()
    def sample(self, step: Progress, prompt: str) -> str:
        """The picture of a prompt with the delta as it is now, as a data URL; always of the same noise."""
        if prompt not in self.encoded:
            self.encoded = {prompt: self.encoder.encode(["", prompt])}
        encoding, denoiser = self.encoded[prompt], self.denoiser
        noise = denoiser.latents([0])
        model: Any = SimpleNamespace(predict=step.predict)
        context = encoding.context.to(denoiser.device)
        for latents in runs(model, denoiser.schedule, noise, context[1:], context[:1], encoding.pooled, denoiser.guided(GLANCE)):  # noqa: B007
            host.check_interrupted()
        file = io.BytesIO()
        assert self.decode is not None
        self.decode(latents).save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
