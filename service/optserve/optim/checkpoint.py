"""An engine as JSON and named tensors, and back, bit for bit.

The names are those of the state file: ``param/<name>``, ``state/<name>/<torch's key>``,
``ema/<name>``, ``best/<name>``, ``window/<name>``, ``lbfgs/<i>``. torch's own load_state_dict casts
moments to the parameter's dtype and aliases live tensors; here each tensor keeps its own dtype, and
is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from optserve.optim import catalogue
from optserve.optim.arena import from_wire, to_wire
from optserve.optim.averages import arena_of
from optserve.optim.engine import Engine
from optserve.optim.hyper import FLAGS
from optserve.optim.layout import Layout
from optserve.optim.recipe import Recipe
from optserve.optim.rounding import TORCH_DTYPES
from optserve.optim.tree import flatten, unflatten
from optserve_client import wire


def dump(engine: Engine) -> tuple[dict[str, Any], dict[str, wire.Tensor]]:
    """Return the engine's state. The tensors share memory with it: write or copy them at once."""
    tensors: dict[str, torch.Tensor] = {f"param/{n}": v for n, v in engine.params.views.items()}
    names = {id(p): name for name, p in engine.parameters.items()}
    meta: dict[str, Any] = {
        "groups": [
            {
                "params": [names[id(p)] for p in group["params"]],
                "hyper": flatten(
                    {k: v for k, v in group.items() if k not in FLAGS}, f"group/{i}", tensors
                )[0],
            }
            for i, group in enumerate(engine.optimizer.param_groups)
        ],
        "state": {
            name: flatten(catalogue.read_state(engine.optimizer, p), f"state/{name}", tensors)[0]
            for name, p in engine.parameters.items()
        },
        "extra": flatten(catalogue.read_extra(engine.optimizer), "extra", tensors)[0],
        "scheduler": engine.scheduler.state() if engine.scheduler else None,
    }
    if engine.ema is not None:
        meta["ema"] = {"updates": engine.ema.updates}
        tensors |= {f"ema/{n}": v for n, v in engine.ema.arena.views.items()}
    if engine.best is not None:
        meta["best"] = {"value": engine.best.value, "version": engine.best.version}
        tensors |= {f"best/{n}": v for n, v in engine.best.arena.views.items()}
    if engine.window.count:
        meta["window"] = {
            "count": engine.window.count,
            "sums": flatten(_plain(engine.window.sums), "window", tensors)[0],
        }
    if engine.line_search is not None and engine.line_search.open:
        record = [(loss, grad) for loss, grad in engine.line_search.record]
        meta["line_search"] = flatten(record, "lbfgs", tensors)[0]
        for kind in ("start", "trial"):
            arena = getattr(engine.line_search, kind)
            if arena is not None:
                tensors |= {f"{kind}/{n}": v for n, v in arena.views.items()}
    return meta, {name: to_wire(tensor) for name, tensor in tensors.items()}


def load(
    recipe: Recipe, layout: Layout, meta: Mapping[str, Any], tensors: Mapping[str, wire.Tensor]
) -> Engine:
    """Return an engine in the state that :func:`dump` wrote; ``tensors`` are copied.

    Building optimizer and scheduler writes groups and lr, so what was saved goes in afterwards.
    Raises KeyError, TypeError or ValueError when the pieces do not belong together.
    """
    device = recipe.device
    found = {name: from_wire(tensor) for name, tensor in tensors.items()}
    engine = Engine(recipe, layout, {n: tensors[f"param/{n}"] for n in layout.names})
    catalogue.write_extra(engine.optimizer, unflatten(meta["extra"], found, device))
    for name, saved in meta["state"].items():
        state = unflatten(saved, found, device)
        catalogue.write_state(engine.optimizer, engine.parameters[name], state)
    if (wanted := len(engine.optimizer.param_groups)) != (count := len(meta["groups"])):
        raise ValueError(f"groups has {count} entries, the configuration makes {wanted}")
    for group, entry in zip(engine.optimizer.param_groups, meta["groups"], strict=True):
        hyper = unflatten(entry["hyper"], found, device)
        if taken := FLAGS & hyper.keys():
            raise ValueError(f"hyper of a group cannot set {', '.join(sorted(taken))}")
        group.update(hyper)
    if engine.scheduler is not None:
        engine.scheduler.load(meta["scheduler"])
    if engine.ema is not None:
        engine.ema.updates = meta["ema"]["updates"]
        wide = engine.ema.arena.flat.dtype
        engine.ema.arena = arena_of(layout, device, _named("ema/", layout, found, wide), wide)
    if engine.best is not None:
        engine.best.value, engine.best.version = meta["best"]["value"], meta["best"]["version"]
        engine.best.arena = arena_of(layout, device, _named("best/", layout, found))
    if "window" in meta:
        engine.window.count = meta["window"]["count"]
        sums = unflatten(meta["window"]["sums"], found, device)
        engine.window.sums = {name: _from_plain(kept) for name, kept in sums.items()}
    if engine.line_search is not None and "line_search" in meta:
        engine.line_search.record = unflatten(meta["line_search"], found, device)
        for kind in ("start", "trial"):
            if f"{kind}/{layout.names[0]}" in found:
                arena = arena_of(layout, device, _named(f"{kind}/", layout, found))
                setattr(engine.line_search, kind, arena)
    return engine


def _named(
    kind: str,
    layout: Layout,
    found: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    tensors = {name: found[kind + name] for name in layout.names}
    wanted = dtype or TORCH_DTYPES[layout.dtype]
    for slot in layout.slots:
        tensor = tensors[slot.name]
        if tuple(tensor.shape) != slot.shape or tensor.dtype != wanted:
            raise ValueError(
                f"{kind + slot.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {wanted} {list(slot.shape)}"
            )
    return tensors


def _plain(sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Sparse sums as their parts: a state file holds dense tensors only."""
    return {
        name: {
            "indices": s.coalesce().indices(),
            "values": s.coalesce().values(),
            "shape": list(s.shape),
        }
        if s.is_sparse
        else s
        for name, s in sums.items()
    }


def _from_plain(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    made: torch.Tensor = torch.sparse_coo_tensor(
        kept["indices"], kept["values"], kept["shape"], check_invariants=True
    )
    return made.coalesce()
