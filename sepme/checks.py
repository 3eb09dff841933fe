"""Numbers from outside, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import SepMEError

SEEDS = (-(1 << 63), (1 << 64) - 1)  # what torch's generators take


def check_number(what: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Raise :class:`SepMEError` unless ``value`` is a number from ``low`` to ``high`` (NaN is none), an integer if ``whole``."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise SepMEError(f"{what} must be {kind} from {low:.10g} to {high:.10g}, not {str(value)[:40]}.")


def check_numbers(options: Any, ranges: Mapping[str, tuple[float, float]], whole: frozenset[str] = frozenset()) -> None:
    """The same for attributes of ``options``, by name."""
    for name, (low, high) in ranges.items():
        check_number(name.replace("_", " "), getattr(options, name), low, high, whole=name in whole)


def check_finite(values: Tensor, part: str, where: str) -> Tensor:
    """The values, unless some are NaN or infinite: then :class:`SepMEError` says which part of the model they come from."""
    if values.isfinite().all():
        return values
    raise SepMEError(
        f"The model's {part} gives NaN or infinite values ({where}); its file is damaged or overflows in this precision: "
        "try float32 or bfloat16, or get the model again."
    )


def following_seed(seed: int, by: int = 1) -> int:
    """The seed ``by`` further; after the last one the count begins at 0 again."""
    return seed + by if seed + by <= SEEDS[1] else seed + by - SEEDS[1] - 1
