"""Replacing the ``forward`` of a model's modules for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@contextmanager
def patched(modules: Mapping[str, nn.Module], wrap: Callable[[str, nn.Module, Forward], Forward]) -> Iterator[None]:
    """Replace ``module.forward`` by ``wrap(name, module, forward)`` and leave the modules as they were found."""
    found: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in modules.items():
            found.append((module, module.__dict__.get("forward")))
            module.forward = wrap(name, module, module.forward)
        yield
    finally:
        for module, forward in reversed(found):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
