"""Params must be finite: nothing that follows from a NaN is worth keeping."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optserve_client import wire
from optserve_client.errors import Nonfinite


def check_finite(params: Mapping[str, wire.Tensor]) -> None:
    """Raise Nonfinite for the first NaN or Infinity, naming tensor and index."""
    for name, tensor in params.items():
        values = tensor.to_float32() if isinstance(tensor, wire.Bits) else tensor
        finite = np.isfinite(values)
        if not finite.all():
            index = np.unravel_index(int(np.argmin(finite)), finite.shape)
            at = [int(i) for i in index]
            raise Nonfinite(f"params[{name!r}]{at or ''} is {values[index]}, must be finite")
