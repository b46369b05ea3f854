"""What a session says about itself: status, list row, scheduler, history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optserve.optim import preview
from optserve.sessions.state import SessionState
from optserve.sessions.stepping import scheduler_line
from optserve.store.base import Event, Key, SessionRow, Store
from optserve_client import wire
from optserve_client.errors import Conflict

#: What is said of a session whose row cannot be read.
UNKNOWN: Mapping[str, Any] = {
    "name": None,
    "tags": {},
    "optimizer": "?",
    "generation": "",
    "numel": 0,
    "dtype": "?",
    "durability": "?",
    "ttl_s": None,
    "resident_bytes": 0,
}


def about(state: SessionState, resident_bytes: int) -> dict[str, Any]:
    """Return what must be known of a session without reading its journal, and seldom changes."""
    config = state.config
    return {
        "name": config["name"],
        "tags": config["tags"],
        "optimizer": config["optimizer"]["name"],
        "generation": state.generation,
        "numel": state.layout.numel,
        "dtype": config["dtype"],
        "durability": config["durability"],
        "ttl_s": config["ttl_s"],
        "resident_bytes": resident_bytes,
    }


def summary(row: SessionRow) -> dict[str, Any]:
    """Return the row of a session list; times are Unix seconds."""
    said = row.about
    return {
        "id": row.key.session,
        "name": said["name"],
        "tags": said["tags"],
        "optimizer": said["optimizer"],
        "generation": said["generation"],
        "version": row.version,
        "updates": row.updates,
        "numel": said["numel"],
        "dtype": said["dtype"],
        "durability": said["durability"],
        "created_at": row.created,
        "updated_at": row.changed,
    }


def status(row: SessionRow, state: SessionState) -> dict[str, Any]:
    """Return everything about a session but its tensors."""
    engine, config = state.engine, state.config
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    groups = [
        {"params": [names[id(p)] for p in group["params"]], **hyper}
        for group, hyper in zip(engine.optimizer.param_groups, engine.groups(), strict=True)
    ]
    dtype = wire.dtype_name(state.layout.dtype)
    said: dict[str, Any] = {
        **summary(row),
        "notes": config["notes"],
        "config": {k: v for k, v in config.items() if k not in ("name", "notes", "tags", "ttl_s")},
        "torch": engine.torch_line,
        "impl": engine.impl,
        "groups": groups,
        "scheduler": scheduler(state) if engine.scheduler is not None else None,
        "order": state.layout.names,
        "params": {
            slot.name: {"shape": list(slot.shape), "dtype": dtype} for slot in state.layout.slots
        },
    }
    said["ttl_s"] = config["ttl_s"]
    said["recovery"] = {"bit_exact": state.inexact is None, "reason": state.inexact}
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
    first = store.first_at(key, after_version + 1)
    events = store.events(key, after_lsn=first - 1, payloads=False) if first is not None else ()
    for event in events:
        reply = event.record.get("reply", {})
        if reply.get("applied_version") is not None and event.version > made:
            if len(rows) == limit:
                break
            made = event.version
            rows[made] = _history_row(event)
    if rows:
        later = store.events(key, after_lsn=first or 0, kinds={"metrics"}, payloads=False)
        for request in (event.record["request"] for event in later):
            if request["version"] in rows:
                rows[request["version"]]["metrics"].update(request["metrics"])
    return list(rows.values())


def _history_row(event: Event) -> dict[str, Any]:
    reply = event.record["reply"]
    return {
        "version": event.version,
        "updates": event.updates,
        "kind": event.kind,
        "time": event.time,
        "worker": event.worker,
        "lr": [group.get("lr") for group in reply.get("groups", [])],
        "loss": event.loss,
        "grad_norm": reply.get("grad_norm"),
        "clip_coef": reply.get("clip_coef"),
        "metrics": dict(event.record.get("request", {}).get("metrics", {})),
    }


def finite(value: float | None) -> float | None:
    """Return ``value``, or None for what a number column cannot hold."""
    return value if value is not None and math.isfinite(value) else None
