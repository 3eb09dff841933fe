"""Figures of the drawing worlds as signed distance fields, so that every style (fill, outline, glow) is one expression of the distance.

Units are the figure's radius; distances are negative inside; y points up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def star(x: Tensor, y: Tensor, outer: float = 1.2, inner: float = 0.52) -> Tensor:
    sector = math.pi / 5
    radius, angle = torch.hypot(x, y), torch.atan2(x, y)
    angle = (angle + sector) % (2 * sector) - sector
    px, py = radius * torch.sin(angle).abs(), radius * torch.cos(angle)
    ex, ey = inner * math.sin(sector), inner * math.cos(sector) - outer
    length = math.hypot(ex, ey)
    return ((py - outer) * ex - px * ey) / length


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88


def triangle(x: Tensor, y: Tensor) -> Tensor:
    edge = math.sqrt(3) / 2 * x.abs() + 0.5 * y
    return torch.maximum(edge, -y) - 0.58


def cross(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.abs(), y.abs()
    return torch.minimum(torch.maximum(a - 0.42, b - 1.08), torch.maximum(b - 0.42, a - 1.08))


def heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs() / 1.8, y / 1.8 + 0.52
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = 0.5 * (x + y).clamp(min=0)
    body = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - along, y - along)) * (x - y).sign()
    return 1.8 * torch.where(x + y > 1, lobe, body)


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.32


def moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x + 0.15, y) - 1.1, 0.85 - torch.hypot(x - 0.45, y - 0.2))


def flower(x: Tensor, y: Tensor) -> Tensor:
    return 0.7 * (torch.hypot(x, y) - 0.82 - 0.32 * torch.cos(5 * torch.atan2(x, y)))


def drop(x: Tensor, y: Tensor) -> Tensor:
    cone = torch.maximum(0.901 * x.abs() + 0.433 * (y - 1.15), -0.07 - y)
    return torch.minimum(torch.hypot(x, y + 0.4) - 0.7, cone)


def polygon(*corners: tuple[float, float]) -> Field:
    """The field of a simple polygon."""

    def field(x: Tensor, y: Tensor) -> Tensor:
        nearest, sign = torch.full_like(x, math.inf), torch.ones_like(x)
        for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
            ex, ey = bx - ax, by - ay
            along = ((x - ax) * ex + (y - ay) * ey).div(ex * ex + ey * ey).clamp(0, 1)
            nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
            crossed = ((y >= ay) != (y >= by)) & ((ex * (y - ay) > ey * (x - ax)) == (by > ay))
            sign = torch.where(crossed, -sign, sign)
        return nearest * sign

    return field


def mirrored(*right: tuple[float, float]) -> Field:
    """A polygon that is symmetric to the y axis, given by the corners of its right half from top to bottom."""
    left: Sequence[tuple[float, float]] = [(-x, y) for x, y in reversed(right) if x]
    return polygon(*right, *left)


SHAPES: dict[str, Field] = {
    "star": star,
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "cross": cross,
    "heart": heart,
    "ring": ring,
    "moon": moon,
    "flower": flower,
    "drop": drop,
    "diamond": mirrored((0, 1.2), (0.78, 0), (0, -1.2)),
    "hourglass": mirrored((0.85, 1.05), (0.18, 0), (0.85, -1.05)),
    "house": mirrored((0, 1.15), (1.1, 0.15), (0.78, 0.15), (0.78, -0.95)),
    "tree": mirrored((0, 1.2), (0.65, 0.35), (0.35, 0.35), (0.95, -0.6), (0.22, -0.6), (0.22, -1.15)),
    "arrow": polygon((1.15, 0), (0.1, 1), (0.1, 0.4), (-1.1, 0.4), (-1.1, -0.4), (0.1, -0.4), (0.1, -1)),
    "bolt": polygon((0.6, 1.15), (-0.75, -0.2), (-0.1, -0.2), (-0.5, -1.15), (0.75, 0.3), (0.1, 0.3)),
}
