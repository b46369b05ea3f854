"""Hyperparameters between torch's param_groups and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from types import NoneType
from typing import Any

import numpy as np
import torch

#: Flags of the implementation, not hyperparameters: never shown, never patched.
FLAGS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def shown(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a param_group as JSON has them."""
    return {name: json_value(value) for name, value in group.items() if name not in FLAGS}


class Shown:
    """What :func:`shown` makes of an optimizer's param_groups, anew only where a value changed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[Any], dict[str, Any]]] = {}

    def of(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the hyperparameters of each group; they are shared: do not change them."""
        made = []
        for i, group in enumerate(groups):
            values = list(group.values())
            known, one = self._known.get(i, ([], {}))
            if not (len(known) == len(values) and all(map(is_, known, values))):
                one = shown(group)
                # What could change in place is looked at each time.
                lasts = all(isinstance(v, _LASTING) for k, v in group.items() if k != "params")
                self._known[i] = (values if lasts else [], one)
            made.append(one)
        return made


_LASTING = (float, int, str, tuple, torch.dtype, NoneType)


def json_value(value: Any) -> Any:
    """Return ``value`` as strict JSON: no tuples, tensors, dtypes, NaN or Infinity."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [json_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): json_value(item) for name, item in value.items()}
    return str(value).removeprefix("torch.")


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
