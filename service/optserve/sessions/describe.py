"""What a session says about itself: status, list row, scheduler, history."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from optserve.optim import preview
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import scheduler_line
from optserve.store import Key, Store
from optserve_client import wire
from optserve_client.errors import Conflict

#: Kinds of events that make a version.
VERSION_KINDS = ("create", "step", "evaluate", "params", "group", "import")


def summary(session_id: str, state: SessionState) -> dict[str, Any]:
    """Return the row of a session list; times are Unix seconds."""
    config = state.config
    return {
        "id": session_id,
        "name": config["name"],
        "tags": config["tags"],
        "optimizer": config["optimizer"]["name"],
        "generation": state.generation,
        "version": state.version,
        "updates": state.updates,
        "numel": sum(slot.numel for slot in state.layout.slots),
        "dtype": config["dtype"],
        "durability": config["durability"],
        "created_at": state.created,
        "updated_at": state.changed,
    }


def status(session_id: str, state: SessionState) -> dict[str, Any]:
    """Return everything about a session but its tensors."""
    engine, config = state.engine, state.config
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    groups = [
        {"params": [names[id(p)] for p in group["params"]], **hyper}
        for group, hyper in zip(engine.optimizer.param_groups, engine.groups(), strict=True)
    ]
    dtype = wire.dtype_name(state.layout.dtype)
    said: dict[str, Any] = {
        **summary(session_id, state),
        "notes": config["notes"],
        "config": {k: v for k, v in config.items() if k not in ("name", "notes", "tags")},
        "torch": engine.torch_line,
        "impl": engine.impl,
        "groups": groups,
        "scheduler": scheduler(state) if engine.scheduler is not None else None,
        "order": state.layout.names,
        "params": {
            slot.name: {"shape": list(slot.shape), "dtype": dtype} for slot in state.layout.slots
        },
    }
    if engine.window.steps > 1:
        said["accumulated"] = engine.window.count
    if engine.best is not None:
        said["best"] = {"value": engine.best.value, "version": engine.best.version}
    if engine.line_search is not None:
        said["line_search"] = {"evaluations": len(engine.line_search.record)}
    return said


def scheduler(state: SessionState) -> dict[str, Any]:
    """Return the scheduler's specification and where it stands."""
    if state.engine.scheduler is None:
        raise Conflict("the session has no scheduler; PUT one first")
    return {"spec": state.config["scheduler"], **(scheduler_line(state) or {})}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A scheduler as it stands, apart from its session."""

    spec: dict[str, Any]
    groups: list[dict[str, Any]]
    state: dict[str, Any]

    @classmethod
    def of(cls, state: SessionState) -> Outlook:
        engine = state.engine
        if engine.scheduler is None:
            raise Conflict("the session has no scheduler; PUT one first")
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in engine.optimizer.param_groups
        ]
        spec = state.config["scheduler"]
        return cls(spec=spec, groups=groups, state=engine.scheduler.state())

    def ahead(self, steps: int, metrics: list[float] | None = None) -> dict[str, Any]:
        """Return the hyperparameters of the next ``steps`` advances, from now on."""
        rows = preview.preview(self.spec, self.groups, steps, state=self.state, metrics=metrics)
        return {"steps": rows}


def history(store: Store, key: Key, after_version: int, limit: int) -> list[dict[str, Any]]:
    """Return one row per version above ``after_version``, oldest first, at most ``limit``."""
    rows: dict[int, dict[str, Any]] = {}
    made = after_version
    for event in store.events(key):
        request, reply = event.record.get("request", {}), event.record.get("reply", {})
        if event.kind == "metrics":
            if request["version"] in rows:
                rows[request["version"]]["metrics"].update(request["metrics"])
        elif reply.get("applied_version") is not None and event.version > made:
            made = event.version
            if len(rows) < limit:
                rows[event.version] = {
                    "version": event.version,
                    "updates": event.updates,
                    "kind": event.kind,
                    "time": event.time,
                    "worker": event.worker,
                    "lr": [group.get("lr") for group in reply.get("groups", [])],
                    "loss": event.loss,
                    "grad_norm": reply.get("grad_norm"),
                    "clip_coef": reply.get("clip_coef"),
                    "metrics": dict(request.get("metrics", {})),
                }
    return list(rows.values())


def finite(value: float | None) -> float | None:
    """Return ``value``, or None for what a number column cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def strict(value: Any) -> Any:
    """Return ``value`` as strict JSON: NaN and Infinity are strings, tuples are lists."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
