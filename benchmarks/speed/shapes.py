"""The sizes that are measured: shapes of named tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shapes = Sequence[Sequence[int]]

RESNET = "resnet50"
#: Name of a size -> how it is printed.
LABELS = {
    "10": "10",
    "1k": "1 k",
    "100k": "100 k",
    "1M": "1 M",
    "25M": "25 M",
    RESNET: "25 M (ResNet-50, 161 tensors)",
    "100M": "100 M",
}
_UNITS = {"k": 1_000, "M": 1_000_000}


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of torchvision's resnet50: 161 tensors, 25,557,032 parameters."""

    def normed(out: int, inside: int, side: int) -> list[tuple[int, ...]]:
        return [(out, inside, side, side), (out,), (out,)]  # convolution, norm's weight and bias

    shapes, inside = normed(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += normed(width, inside, 1) + normed(width, width, 3)
            shapes += normed(4 * width, width, 1)
            if block == 0:
                shapes += normed(4 * width, inside, 1)
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def shapes_of(size: str) -> Shapes:
    """Return the shapes of ``size``: one tensor for ``10``, ``1k``, ``25M``."""
    if size == RESNET:
        return resnet50()
    number = int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)
    return [(number,)]


def numel(size: str) -> int:
    return sum(math.prod(shape) for shape in shapes_of(size))


def names(shapes: Shapes) -> list[str]:
    """Return a name for each tensor; they sort as the tensors come."""
    return [f"w{number:03d}" for number in range(len(shapes))]
