"""A dry step on a throw-away copy, so that what torch would refuse is known at creation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from optserve.optim.arena import GradientBuffer
from optserve.optim.engine import Engine
from optserve.optim.layout import Layout
from optserve.optim.recipe import Recipe
from optserve.optim.refusals import torchs_refusals
from optserve_client import wire
from optserve_client.errors import TorchRefused

#: Above this many elements the copy is made of smaller tensors: what torch refuses depends on
#: rank, emptiness, dtype and hyperparameters, not on how long a dimension is.
_FULL_SIZE_ELEMENTS = 100_000
_SMALL_DIMENSION = 8


@dataclass(frozen=True)
class _Coo:
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Ones:
    buffer: GradientBuffer
    none: frozenset[str] = frozenset()
    sparse: Mapping[str, Any] = field(default_factory=dict)


def rehearse(recipe: Recipe, layout: Layout) -> int:
    """Build the session's optimizer on stand-in params and make one update.

    Return about how many bytes the session will take in memory: exact where the stand-in has its
    size, else in proportion to the params. Raises TorchRefused with torch's sentence, or any
    refusal of ours.
    """
    small = _small(layout)
    with torchs_refusals():
        engine = Engine(replace(recipe, accumulate_steps=1), small, None)
        step(engine)
    window = layout.nbytes if recipe.accumulate_steps > 1 else 0
    return engine.nbytes() * layout.numel // max(small.numel, 1) + window


def _small(layout: Layout) -> Layout:
    numel = sum(slot.numel for slot in layout.slots)
    if numel <= _FULL_SIZE_ELEMENTS:
        return layout
    shapes = [(s.name, tuple(min(d, _SMALL_DIMENSION) for d in s.shape)) for s in layout.slots]
    return Layout.pack(layout.dtype, shapes)


def rehearse_change(engine: Engine, index: int, change: Mapping[str, Any]) -> None:
    """Rehearse the engine's recipe with other hyperparameters of one group, after a first step."""
    with torchs_refusals():
        trial = Engine(replace(engine.recipe, accumulate_steps=1), _small(engine.layout), None)
        step(trial)
        trial.assign([*({} for _ in range(index)), change])
        step(trial)
        if trial.entry.eval_weights:
            trial.eval_bytes()


def rehearse_group(
    engine: Engine, fields: Mapping[str, Any], params: Mapping[str, wire.Tensor]
) -> int:
    """Rehearse the engine's recipe with one more group of new params; return as rehearse."""
    shapes = [(slot.name, slot.shape) for slot in engine.layout.slots]
    added = [(name, tuple(tensor.shape)) for name, tensor in params.items()]
    groups = (*engine.recipe.groups, {**fields, "params": list(params)})
    return rehearse(
        replace(engine.recipe, groups=groups), Layout.pack(engine.layout.dtype, shapes + added)
    )


def step(engine: Engine) -> None:
    """Make one update of a throw-away engine, with a gradient of one half everywhere."""
    buffer = engine.pool.lease()
    buffer.arena.flat.fill_(0.5)
    sparse = {name: _one_element(engine.layout, name) for name in engine.recipe.sparse}
    if engine.line_search is not None:
        engine.evaluate(1.0, _Ones(buffer), metric=1.0)
    else:
        engine.push(engine.inspect(_Ones(buffer, sparse=sparse)), metric=1.0)


def _one_element(layout: Layout, name: str) -> _Coo:
    shape = layout.by_name[name].shape
    if not shape:
        raise TorchRefused(f"sparse: params[{name!r}] is a scalar; a sparse gradient needs rows")
    nnz = 0 if 0 in shape else 1
    values = torch.ones(
        (nnz, *shape[1:]), dtype=torch.float64 if layout.dtype == "F64" else torch.float32
    )
    return _Coo(np.zeros((1, nnz), np.int64), values.numpy(), shape)
