"""Params must be finite: nothing that follows from a NaN is worth keeping."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optserve_client import wire
from optserve_client.errors import Nonfinite

#: Elements looked at together, so that a large tensor needs no mask of its own size.
_BLOCK = 2**18


def check_finite(params: Mapping[str, wire.Tensor]) -> None:
    """Raise Nonfinite for the first NaN or Infinity, naming tensor and index."""
    for name, tensor in params.items():
        raw = tensor.array if isinstance(tensor, wire.Bits) else tensor
        flat = np.ravel(raw)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            if isinstance(tensor, wire.Bits):
                values = wire.Bits(block, tensor.dtype).to_float32()
            else:
                values = block
            finite = np.isfinite(values)
            if not finite.all():
                at = int(np.argmin(finite))
                index = [int(i) for i in np.unravel_index(start + at, raw.shape)]
                raise Nonfinite(f"params[{name!r}]{index or ''} is {values[at]}, must be finite")
