"""Gradients as torch tensors: attached from a request, measured, searched for NaN and Infinity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.linalg import vector_norm as _norm
from torch.nn.utils import get_total_norm

from optserve.optim.arena import GradientBuffer, from_wire
from optserve_client import wire


class Coo(Protocol):
    """A sparse gradient: int64 indices [sparse_dim, nnz], values, and the dense shape."""

    @property
    def indices(self) -> np.ndarray: ...
    @property
    def values(self) -> wire.Tensor: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Gradients(Protocol):
    """What a request brings: the filled buffer, names whose grad is None, and sparse ones."""

    @property
    def buffer(self) -> GradientBuffer: ...
    @property
    def none(self) -> frozenset[str]: ...
    @property
    def sparse(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """One unscaled gradient by name (absent: grad is None), its norm, and its first fault."""

    grads: Mapping[str, torch.Tensor]
    norm: float
    nonfinite: str | None


def to_coo(coo: Coo) -> torch.Tensor:
    """Return a coalesced torch COO tensor: duplicates are summed."""
    made: torch.Tensor = torch.sparse_coo_tensor(
        from_wire(coo.indices), from_wire(coo.values), list(coo.shape), check_invariants=False
    ).coalesce()
    return made


def _dense(grad: torch.Tensor) -> torch.Tensor:
    return grad._values() if grad.is_sparse else grad


def total_norm(grads: Mapping[str, torch.Tensor]) -> float:
    """Return the 2-norm over all gradients, in their order: torch.nn.utils.get_total_norm."""
    tensors = [_dense(grad) for grad in grads.values()]
    if not tensors or tensors[0].device.type != "cpu":
        return float(get_total_norm(tensors))
    # The same operations on one device and dtype, without the sorting by them.
    if len(tensors) == 1:
        return float(_norm(_norm(tensors[0])))
    return float(_norm(torch.stack(torch._foreach_norm(tensors))))


def first_nonfinite(grads: Mapping[str, torch.Tensor]) -> str | None:
    """Return a sentence that names the first NaN or Infinity, or None."""
    for name, grad in grads.items():
        bad = torch.nonzero(~torch.isfinite(_dense(grad)))
        if len(bad):
            index = bad[0].tolist()
            value = float(_dense(grad)[tuple(index)])
            return f"grads[{name!r}]{index or ''} is {value}, must be finite"
    return None
