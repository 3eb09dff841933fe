"""How much memory training takes, counted before it begins: the model is run on tensors that hold no numbers (torch's fake tensors)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..model.layers import weights
from ..model.protocols import Encoding
from ..model.schedule import ScheduledDenoiser
from .increment import Increment, context_site
from .options import TrainOptions
from .passes import make_step
from .run import ConceptRun
from .source import Draw

RANK = 8  # of the increment, the cap in mode subspace; a delta of fewer directions takes little less


class Need(NamedTuple):
    """Bytes: of the model's weights, and of what a step takes beside them."""

    model: int
    step: int

    @property
    def total(self) -> int:
        return self.model + self.step


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on: ``most`` is how many there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(value.alias_info for value in func._schema.returns):  # views and what is changed in place are no new memory
            tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors which ``call`` makes take at once; nothing is computed, and no memory is taken."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Peak() as peak:
        call()
    return peak.most


def needed(denoiser: ScheduledDenoiser, model: int, empty: Encoding, options: TrainOptions) -> Need:
    """What training one concept takes on this model at its size.

    Args:
        model: bytes of the weights.
        empty: the empty prompt, one row.
    """
    return Need(model, max(step_bytes(denoiser, empty, options), peak_bytes(lambda: _run(denoiser, empty, options))))


def step_bytes(denoiser: ScheduledDenoiser, empty: Encoding, options: TrainOptions) -> int:
    """What a training step takes beside the weights."""
    return peak_bytes(lambda: _step(denoiser, empty, options))


def _run(denoiser: ScheduledDenoiser, empty: Encoding, options: TrainOptions) -> None:
    """A denoising step of the runs that x_t is taken from, with guidance."""
    rows = 2 * options.trajectories
    with torch.no_grad():
        denoiser.predict(*_noise(denoiser, rows), *_rows(denoiser, empty, rows)[::2])


def _step(denoiser: ScheduledDenoiser, empty: Encoding, options: TrainOptions) -> None:
    """A training step."""
    sites = weights(denoiser.attention_layers()) if options.edit != "context" else {}
    d_in = empty.context.shape[-1]
    if options.edit != "layers":
        sites = sites | context_site(d_in, torch.promote_types(denoiser.dtype, torch.float32), denoiser.device)
    basis = {"subspace": torch.zeros(RANK, d_in), "paper": torch.zeros(d_in, d_in)}.get(options.mode)
    increment = Increment.zeros(sites, basis, options.beta, options.values_only)
    own = _rows(denoiser, empty, 1)
    words = torch.ones(1, own.context.shape[1], dtype=torch.bool, device=denoiser.device)
    run = ConceptRun("", increment, None, own, own, own, options, None, words)  # type: ignore[arg-type]
    draw = Draw(*_noise(denoiser, options.batch), torch.zeros(options.batch, dtype=torch.int64))
    with denoiser.differentiating():
        loss = options.make_objective().loss(make_step(run, [increment], denoiser, draw))
        torch.autograd.grad(loss, list(increment.w.values()), allow_unused=True)


def _noise(denoiser: ScheduledDenoiser, rows: int) -> tuple[Tensor, Tensor]:
    shape = (rows, *denoiser.latent_shape)
    return torch.zeros(shape, dtype=denoiser.dtype, device=denoiser.device), torch.zeros(rows, dtype=torch.int64, device=denoiser.device)


def _rows(denoiser: ScheduledDenoiser, empty: Encoding, rows: int) -> Encoding:
    """So many prompts of the empty one's shape."""

    def alike(one: Tensor) -> Tensor:
        return torch.zeros((rows, *one.shape[1:]), dtype=one.dtype, device=denoiser.device)

    return Encoding(alike(empty.context), alike(empty.mask), None if empty.pooled is None else alike(empty.pooled))


def told(need: Need, side: int, options: TrainOptions) -> str:
    """What training needs, in a sentence.

    Args:
        side: pixels of a picture's.
    """
    pictures = "picture" if options.batch == 1 else "pictures"
    return (
        f"Training by {options.objective} on {options.batch} {pictures} of {side} x {side} pixels takes about {in_words(need.total)} of "
        f"memory: {in_words(need.model)} for the model, {in_words(need.step)} for a step."
    )


def in_words(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
