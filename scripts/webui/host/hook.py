"""Forwards that stand on a host's modules: ours, and what they call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from modules import shared
from torch import Tensor, nn


class Hook:
    """A ``forward`` that this extension put on a module; ``before`` stood there."""

    def __init__(self, before: Callable[..., Any], call: Callable[..., Any]) -> None:
        self.before, self.call = before, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def previous(module: nn.Module, found: Any) -> Callable[..., Any]:
    """What to call in place of our own hook: what another extension put there, or else the class's own, looked up at every call,
    since hosts patch classes for their LoRAs."""
    while isinstance(found, Hook):
        found = found.before
    if found == MethodType(type(module).forward, module):  # what Forge leaves behind where it took a patch off
        found = None
    return found or ClassForward(module)


class ClassForward:
    """``type(module).forward`` at the time of the call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def plain_weight(self) -> Tensor | None:
        """W where this is nothing but ``c Wᵀ`` now, the host's LoRAs included; None otherwise."""
        module, forward = self.module, type(self.module).forward
        if getattr(module, "bias", None) is not None or getattr(module, "scale_weight", None) is not None:
            return None
        if any(getattr(module, name, None) for name in CHANGING):
            return None
        networks = sys.modules.get("networks")
        if forward.__module__ == "networks" and networks is not None and forward is nn.Linear.forward:  # Automatic1111's LoRAs
            if getattr(shared.opts, "lora_functional", False):
                return None
            networks.network_apply_weights(module)
        elif f"{forward.__module__}.{forward.__qualname__}" not in PLAIN:
            return None
        return module.weight  # type: ignore[return-value]


# forwards that are a plain product unless a module's state says otherwise: PyTorch's, Forge's and Neo's, reForge's and Classic's
PLAIN = (
    "torch.nn.modules.linear.Linear.forward",
    "backend.operations.ForgeOperations.Linear.forward",
    "ldm_patched.modules.ops.disable_weight_init.Linear.forward",
)
# what these forwards look at: casts, LoRAs added at run time
CHANGING = ("parameters_manual_cast", "forge_online_loras", "ldm_patched_cast_weights", "weight_function", "bias_function")
