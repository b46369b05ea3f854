"""Hyperparameters between torch's param_groups and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

#: Flags of the implementation, not hyperparameters: never shown, never patched.
FLAGS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def shown(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a param_group as JSON has them."""
    return {name: _shown(value) for name, value in group.items() if name not in FLAGS}


def _shown(value: Any) -> Any:
    """Return a hyperparameter as JSON has it: no tuples, tensors, dtypes, NaN or Infinity."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [_shown(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def changed_hyper(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return, per group, the hyperparameters that differ."""
    return [
        {k: v for k, v in new.items() if k not in old or old[k] != v}
        for old, new in zip(before, after, strict=True)
    ]


def from_json(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters as torch has them: what JSON writes as a list is a tuple."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in hyper.items()}
