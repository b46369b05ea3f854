"""Conversions between floating-point dtypes, bytes to bytes, as torch's ``Tensor.to`` rounds."""

from __future__ import annotations

import numpy as np
import torch

from optserve.optim.arena import WIRE_TAGS

_DTYPES = {tag: dtype for dtype, tag in WIRE_TAGS.items() if dtype.is_floating_point}


def converted(source: memoryview, have: str, want: str) -> np.ndarray:
    """Return whole elements of the wire dtype ``have`` in ``want``, as uint8."""
    raw = np.frombuffer(source, np.uint8)
    if not raw.flags.writeable:  # of which torch warns
        raw = raw.copy()
    made = torch.from_numpy(raw).view(_DTYPES[have]).to(_DTYPES[want])
    out: np.ndarray = made.view(torch.uint8).numpy()
    return out
