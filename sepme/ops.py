"""The arithmetic at run time, as plain PyTorch: this body is the reference that every kernel is compared with."""

from __future__ import annotations

from torch import Tensor


def add_to_rows(base: Tensor, h: Tensor, up: Tensor, rows: Tensor) -> Tensor:
    """Add ``H Yᵀ`` to the touched rows of keys or values; the other rows keep their bits.

    Args:
        base: ``(rows, tokens, d_out)``, the host's own projection; written in place.
        h: ``(touched, tokens, R)`` float32. up: ``(d_out, R)`` float32. rows: ``(touched,)`` int64, indices into base.

    Returns:
        base.
    """
    base[rows] = (base[rows].float() + h @ up.T).to(base.dtype)
    return base
