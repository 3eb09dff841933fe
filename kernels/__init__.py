"""Triton kernels for ``torch.ops.sepme.*`` (installed by pip as ``sepme_kernels``).

:func:`register` is all that a host calls. Triton itself is imported when a tensor on a GPU first arrives, and whatever is wrong with it
or with the GPU leaves the operators' PyTorch bodies in place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

log = logging.getLogger("sepme")
_failure: str | None = None  # why the kernels were given up in this process


def register(ops: ModuleType) -> None:
    """Put the kernels under the operators for CUDA and ROCm tensors. Imports no Triton; doing it again is harmless.

    Args:
        ops: the module ``sepme.apply.ops``.
    """
    for name, limits, checked in (("project_kv", ops.PROJECT_KV, ("context", "weights")), ("add_to_rows", ops.ADD_TO_ROWS, ("base",))):
        torch.library.register_kernel(f"sepme::{name}", "cuda", _guarded(ops, name, limits, checked))
    ops.accelerate("cuda", unavailable)


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in words; None if they can. Imports Triton."""
    if os.environ.get("SEPME_KERNELS") == "0":
        return "they are switched off by SEPME_KERNELS=0"
    return _failure or _import_failure() or _unsupported(device)


def _guarded(ops: ModuleType, name: str, limits: Any, checked: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """The kernel of an operator where its constraints hold (for its first arguments, which they name), else the eager body."""

    def run(*args: Any) -> torch.Tensor:
        global _failure
        if ops.why_not(limits, **dict(zip(checked, args))) is None:  # noqa: B905
            try:
                from . import projection, rows

                return (projection.project_kv if name == "project_kv" else rows.add_to_rows)(*args)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # no C compiler, a driver that Triton does not know: the picture must still come
                _failure = f"a launch failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
                log.warning("SepME goes on without its Triton kernels: %s", _failure)
        return getattr(ops, f"{name}_eager")(*args)

    return run


@lru_cache
def _import_failure() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"Triton cannot be imported ({type(error).__name__}: {str(error)[:120]})"
    return None


@lru_cache
def _unsupported(device: torch.device) -> str | None:
    """GPUs without the matrix instructions that the kernels are made for."""
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        known = architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
        return None if known else f"{architecture} has no matrix instructions that they use"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"they need compute capability 8.0, this GPU has {major}.{minor}"
