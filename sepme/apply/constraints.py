"""What a kernel asks of its inputs, as data: each constraint can be checked and says in words what it asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Inputs = Mapping[str, Sequence[Tensor]]


class Constraint(Protocol):
    """What a kernel asks of the tensors that it is given."""

    def check(self, inputs: Inputs) -> bool:
        """Whether these tensors, by argument name, fulfil it."""
        ...

    def describe(self) -> str:
        """A clause for a message: what must hold."""
        ...


@dataclass(frozen=True)
class OneDType:
    """The arguments share one of these types."""

    names: tuple[str, ...]
    allowed: tuple[torch.dtype, ...]

    def check(self, inputs: Inputs) -> bool:
        found = {t.dtype for name in self.names for t in inputs[name]}
        return len(found) == 1 and found <= set(self.allowed)

    def describe(self) -> str:
        return f"{', '.join(self.names)} must share one type of {', '.join(str(d).removeprefix('torch.') for d in self.allowed)}"


@dataclass(frozen=True)
class OneDevice:
    """All arguments lie on one device."""

    def check(self, inputs: Inputs) -> bool:
        return len({t.device for tensors in inputs.values() for t in tensors}) == 1

    def describe(self) -> str:
        return "all tensors must lie on one device"


@dataclass(frozen=True)
class Contiguous:
    """The arguments are row-major without gaps."""

    names: tuple[str, ...]

    def check(self, inputs: Inputs) -> bool:
        return all(t.is_contiguous() for name in self.names for t in inputs[name])

    def describe(self) -> str:
        return f"{', '.join(self.names)} must be contiguous"


@dataclass(frozen=True)
class DivisibleBy:
    """A dimension of the arguments is a multiple of ``factor``."""

    names: tuple[str, ...]
    dim: int
    factor: int

    def check(self, inputs: Inputs) -> bool:
        return all(t.shape[self.dim] % self.factor == 0 for name in self.names for t in inputs[name])

    def describe(self) -> str:
        return f"dimension {self.dim} of {', '.join(self.names)} must be a multiple of {self.factor}"


@dataclass(frozen=True)
class Aligned:
    """The arguments start at addresses that are multiples of ``bytes``."""

    names: tuple[str, ...]
    bytes: int

    def check(self, inputs: Inputs) -> bool:
        return all(t.data_ptr() % self.bytes == 0 for name in self.names for t in inputs[name])

    def describe(self) -> str:
        return f"{', '.join(self.names)} must start at a multiple of {self.bytes} bytes"


def broken(constraints: Iterable[Constraint], inputs: Inputs) -> str | None:
    """The first constraint that does not hold, in words; None if all hold."""
    return next((c.describe() for c in constraints if not c.check(inputs)), None)
