"""Conversions between floating-point dtypes as torch's ``Tensor.to`` does them.

What is large is to be converted in few calls, on a thread that computes. torch shares each call out
to the threads of OpenMP, which sleep in between: to wake them for every piece takes longer than the
pieces do, and takes the processors from those who send and receive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

#: By wire tag.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
#: The last elements of a gradient, which are widened over themselves.
_LAST = 2**16
#: Elements of what must not be changed that are copied before they are converted.
_COPIED = 2**22


def converted(source: memoryview, have: str, want: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return whole elements of the wire dtype ``have`` in ``want``, as uint8."""
    raw = np.frombuffer(source, _dtype(have))
    # numpy's memory, not torch's: it is in huge pages, which are sooner there.
    made = np.empty(len(raw), _dtype(want))
    size = len(raw) if raw.flags.writeable else _COPIED
    for at in range(0, len(raw), size or 1):
        piece = raw[at : at + size]
        # Of what is read-only torch would warn.
        elements = torch.from_numpy(piece if piece.flags.writeable else piece.copy())
        to = torch.from_numpy(made[at : at + size]).view(TORCH_DTYPES[want])
        to.copy_(elements.view(TORCH_DTYPES[have]))
    return made.view(np.uint8)


def _dtype(tag: str) -> np.dtype[Any]:
    """Return a dtype of the same size that numpy and torch both have."""
    return np.dtype(f"i{TORCH_DTYPES[tag].itemsize}")


def widen(wide: torch.Tensor, source: memoryview, have: str) -> None:
    """Fill ``wide`` with elements of the narrower dtype ``have``, which lie at its end."""
    if not source:
        return
    wide, narrow = wide.view(-1), torch.frombuffer(source, dtype=TORCH_DTYPES[have])
    # From the front: what is written must stay behind what is still to be read.
    grows = wide.itemsize - narrow.itemsize
    at = 0
    while (left := len(narrow) - at) > _LAST:
        end = at + left * grows // wide.itemsize
        wide[at:end].copy_(narrow[at:end])
        at = end
    wide[at:].copy_(narrow[at:].clone())
