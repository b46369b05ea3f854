"""Dense gradients out of compressed ones: elements that are not zero, and scaled integers."""

from __future__ import annotations

import numpy as np
import torch

from optserve_client import wire

#: Elements that are converted and multiplied in one go, while they are in the cache.
_PIECE = 2**18


def scatter(dense: torch.Tensor, indices: np.ndarray, values: wire.Tensor) -> None:
    """Fill ``dense`` with zeros, and with ``values`` (of its dtype) at the flat ``indices``."""
    dense.zero_()
    bits = values.array if isinstance(values, wire.Bits) else values
    flat = dense.view(-1)
    # bfloat16 is unknown to numpy, which takes indices of any integer dtype as they are.
    raw: np.ndarray = flat.view(torch.int16 if flat.itemsize == 2 else flat.dtype).numpy()
    raw[indices] = bits.view(raw.dtype)


def scale(dense: torch.Tensor, source: memoryview, scales: np.ndarray, block: int) -> None:
    """Fill ``dense`` with the int8 values that lie at its end, each ``block`` of them multiplied by
    their own of the float32 ``scales``; the last block may be shorter.

    Products are float32, or float64 in a float64 tensor; in a bfloat16 one they are rounded again.
    """
    if not source:
        return
    flat, values = dense.view(-1), torch.frombuffer(source, dtype=torch.int8)
    factors = torch.from_numpy(scales)
    if flat.dtype == torch.float64:
        factors = factors.double()
    size, numel, at, begun = flat.itemsize, len(values), 0, 0
    while at < numel:
        rows = min(_PIECE, numel - at) // block
        row = at // block
        end = at + rows * block if rows else min(at + _PIECE, numel, (row + 1) * block)
        # From the front: what is written must stay behind what is still to be read.
        if not begun and end * size > numel * (size - 1) + at:
            values, begun = values[at:].clone(), at
        piece = values[at - begun : end - begun]
        by = factors[row : row + rows, None] if rows else factors[row]
        wide = flat[at:end].view(rows, block) if rows else flat[at:end]
        if flat.dtype == torch.bfloat16:
            wide.copy_(piece.float().view(wide.shape).mul_(by))
        else:
            wide.copy_(piece.view(wide.shape)).mul_(by)
        at = end
