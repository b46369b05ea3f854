"""The gate that a class of pytorch_optimizer passes before the catalogue lists it.

A session gives a class nothing but gradients, keeps its params as views of one buffer, and saves
what it finds in ``state``, in ``param_groups`` and beside them in ``state_dict()``. The gate tries
just that.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch

from optserve.optim import catalogue
from optserve.optim.tree import flatten, unflatten

Build = Callable[[list[Any]], Any]
Shapes = tuple[tuple[int, ...], ...]

STEPS = 12
RELOADS = (1, 5, 6)
_ALL: tuple[tuple[int, ...], ...] = ((), (0, 3), (5,), (3, 4), (40, 24))
#: From all shapes to matrices only: a class may refuse some, if it says so.
SHAPES = (_ALL, _ALL[:1] + _ALL[2:], _ALL[2:], _ALL[3:])


def conforms(build: Build, shapes: tuple[Shapes, ...] = SHAPES) -> list[str]:
    """Return why what ``build`` makes of a list of params cannot be served; empty: it can.

    ``shapes``: the first of these that the class takes is what it is tried with.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            taken, first = _first_taken(build, shapes)
            return [why for why, fault in _FAULTS.items() if fault(build, taken, first)]
        except Exception as exc:
            return [f"{type(exc).__name__}: {exc}"]


def _first_taken(build: Build, choices: tuple[Shapes, ...]) -> tuple[Shapes, list[torch.Tensor]]:
    error: Exception | None = None
    for shapes in choices:
        try:
            return shapes, _train(build, shapes)
        except Exception as exc:
            error = exc
    assert error is not None
    raise error


def _train(
    build: Build, shapes: Shapes, *, arena: bool = False, reload_at: int | None = None
) -> list[torch.Tensor]:
    """Return the params after some steps, if asked with a save and load in between."""
    params = _params(shapes, arena)
    optimizer = build(params)
    for i in range(STEPS):
        if i == reload_at:
            params, optimizer = _reload(build, params, optimizer)
        generator = torch.Generator().manual_seed(100 + i)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach() for param in params]


def _params(shapes: Shapes, arena: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    if arena:
        flat = torch.cat([torch.zeros(1), *(value.reshape(-1) for value in values)])
        sizes = [1, *(value.numel() for value in values)]
        parts = flat.split(sizes)[1:]
        values = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [torch.nn.Parameter(value) for value in values]


def _reload(build: Build, params: list[Any], optimizer: Any) -> tuple[list[Any], Any]:
    tensors: dict[str, torch.Tensor] = {}
    saved = {
        "state": [flatten(catalogue.read_state(optimizer, p), f"s{i}", tensors)[0]
                  for i, p in enumerate(params)],
        "groups": [flatten({k: v for k, v in g.items() if k != "params"}, f"g{i}", tensors)[0]
                   for i, g in enumerate(optimizer.param_groups)],
        "extra": flatten(catalogue.read_extra(optimizer), "x", tensors)[0],
    }  # fmt: skip
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    back = json.loads(json.dumps(saved, allow_nan=False))
    params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = build(params)
    catalogue.write_extra(optimizer, unflatten(back["extra"], kept))
    for param, state in zip(params, back["state"], strict=True):
        catalogue.write_state(optimizer, param, unflatten(state, kept))
    for group, values in zip(optimizer.param_groups, back["groups"], strict=True):
        group.update(unflatten(values, kept))
    return params, optimizer


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


_FAULTS: dict[str, Callable[[Build, Shapes, list[torch.Tensor]], bool]] = {
    "does not move the params": lambda _, s, first: _equal(first, _params(s, False)),
    "makes params that are not finite": lambda _b, _s, first: (
        not all(torch.isfinite(param).all() for param in first)
    ),
    "is not deterministic": lambda b, s, first: not _equal(first, _train(b, s)),
    "differs on views of one buffer": lambda b, s, first: (
        not _equal(first, _train(b, s, arena=True))
    ),
    "goes on otherwise after save and load": lambda b, s, first: (
        not all(_equal(first, _train(b, s, reload_at=at)) for at in RELOADS)
    ),
    "has no lr in its groups": lambda b, s, _: "lr" not in b(_params(s, False)).param_groups[0],
}
