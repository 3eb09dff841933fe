"""What noise cannot touch: operators, floating-point operations and bytes of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # views neither run nor move anything
            self.operators += 1
            tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def count(run: Callable[[], Any]) -> dict[str, int]:
    """Count one call.

    Returns:
        ``operators`` (PyTorch operators that are no views), ``flops`` (of matrix products, convolutions and attention) and ``bytes``
        (of their arguments and results).
    """
    with FlopCounterMode(display=False) as flops:
        run()
    with _Counter() as counter:
        run()
    return {"operators": counter.operators, "flops": int(flops.get_total_flops()), "bytes": counter.bytes}
