"""Long jobs in a node: progress, the interrupt button, models loaded through ComfyUI's accounting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...sepme.model.layers import leave_inference_mode


def check_interrupted() -> None:
    """Raise ComfyUI's own exception when the user pressed interrupt."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class NodeProgress:
    """The progress bar of a node whose parts are shown one after another on one scale of 1000."""

    def __init__(self, parts: int) -> None:
        self.bar, self.parts, self.part, self.reached = comfy.utils.ProgressBar(1000), max(parts, 1), 0, 0

    def show(self, done: float) -> None:
        """Set the bar to ``done`` (0 to 1) of the current part; stop when interrupted."""
        check_interrupted()
        self.reached = max(self.reached, round(1000 * (self.part + min(done, 1.0)) / self.parts))  # a part may have several stages
        self.bar.update_absolute(self.reached, 1000)

    def stage(self, what: str, done: int, total: int) -> None:
        """The same, as planning and verifying report it (:data:`~sepme.progress.OnProgress`)."""
        self.show(done / max(total, 1))

    def next(self) -> None:
        """The current part is done."""
        self.part += 1
        self.show(0.0)


def part_of(show: Callable[[float], None], part: int, parts: int) -> Callable[[float], None]:
    """What shows the progress (0 to 1) of one of several equal parts where ``show`` shows that of all."""
    return lambda done: show((part + done) / parts)


def free_memory(patcher: Any) -> int:
    """Bytes that a model and what is done with it may take, on the device that it runs on."""
    device = patcher.load_device
    return int(comfy.model_management.get_free_memory(device)) + (int(patcher.loaded_size()) if device.type != "cpu" else 0)


@contextmanager
def loaded(patcher: Any) -> Iterator[None]:
    """A model whose weights are read, not trained, as far as it fits into the memory; its LoRAs are in effect."""
    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def trainable(patcher: Any, latents: Sequence[int]) -> Iterator[Any]:
    """Load a model completely, with gradients possible, for as long as the block runs; yields the model.

    Args:
        patcher: a MODEL; its LoRAs are in effect.
        latents: shape of the batch, for the memory that has to be free.
    """
    with torch.inference_mode(False), torch.enable_grad():
        needed = 3 * patcher.memory_required(list(latents))  # activations are stored for the backward pass
        comfy.model_management.load_models_gpu([patcher], memory_required=needed, force_full_load=True)
        model = patcher.model
        leave_inference_mode(model)
        asked = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        try:
            yield model
        finally:
            for p in asked:
                p.requires_grad_()
            comfy.model_management.soft_empty_cache()
