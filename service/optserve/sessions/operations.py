"""Every change of a session but the step: what must hold, and what it does.

``check`` raises without having changed anything. ``apply`` changes the state; live requests and
replay both call it, replay with what ``of`` makes of a committed event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optserve.optim import rehearsal, schedules
from optserve.optim.hyper import from_json
from optserve.sessions import config as configs
from optserve.sessions import frames
from optserve.sessions.config import Description, PatchFields
from optserve.sessions.finite import check_finite
from optserve.sessions.kinds import WITH_PAYLOAD
from optserve.sessions.operation import Buffers, Operation
from optserve.sessions.reaching import Pin, Rollback, Unpin
from optserve.sessions.state import SessionState, read_engine
from optserve.sessions.stepping import Change, scheduler_line
from optserve.sessions.workers import check_fit
from optserve.store import Event
from optserve_client import wire
from optserve_client.errors import Conflict, Internal, Invalid

__all__ = [
    "AddGroup",
    "AdvanceScheduler",
    "Import",
    "Operation",
    "Patch",
    "PatchGroup",
    "Pin",
    "PutMetrics",
    "Rollback",
    "SetParams",
    "SetScheduler",
    "Unpin",
    "check_params",
    "hardens",
    "of_event",
]


#: What PATCH may change without a number being another one.
_COUNTED = frozenset({"durability", "ttl_s", "workers", *Description.model_fields})


@dataclass(frozen=True, kw_only=True)
class SetParams:
    """Overwrite all params, keeping the optimizer's state."""

    params: Mapping[str, wire.Tensor]

    @property
    def frame(self) -> Buffers | None:
        return wire.encode({f"param/{name}": tensor for name, tensor in self.params.items()})

    def check(self, state: SessionState, abandon: bool) -> None:
        state.round.check_not_open()
        state.check_no_window()
        state.check_line_search(abandon)
        check_params(self.params, state)

    def apply(self, state: SessionState) -> Change:
        state.end_line_search()
        tag = state.layout.dtype
        state.engine.params.fill({n: wire.widen(t, tag, n) for n, t in self.params.items()})
        return Change(kind="params", moves=True)


def check_params(params: Mapping[str, wire.Tensor], state: SessionState) -> None:
    """Refuse params that are not exactly the session's, and dtypes that would round."""
    layout = state.layout
    if missing := [name for name in layout.names if name not in params]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise Invalid(f"params lacks {missing[0]!r}{more}")
    for name, tensor in params.items():
        if name not in layout.by_name:
            raise Invalid(f"params[{name!r}]: the session has no such parameter")
        if tuple(tensor.shape) != layout.by_name[name].shape:
            raise Invalid(
                f"params[{name!r}] has shape {list(tensor.shape)}, "
                f"expected {list(layout.by_name[name].shape)}"
            )
        wire.widen(tensor, layout.dtype, f"params[{name!r}]")
    check_finite(params)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Change clip, accumulate, nonfinite, name, notes, tags."""

    #: Only what is to change; already normalised.
    config: Mapping[str, Any]
    frame: None = None

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> Patch:
        fields = PatchFields.parse(body)
        return cls(config=fields.model_dump(include=fields.model_fields_set))

    def _computes(self) -> bool:
        return not self.config.keys() <= _COUNTED

    def check(self, state: SessionState, abandon: bool) -> int | None:
        if not self.config:
            raise Invalid("the body is empty: name what is to change")
        if self._computes():
            state.check_line_search(abandon)
        if state.engine.line_search is not None:
            for name in ("clip_grad_norm", "clip_grad_value"):
                if self.config.get(name) is not None:
                    raise Invalid(f"{name} cannot be used with {state.engine.entry.name}")
            if self.config.get("accumulate", {"steps": 1})["steps"] != 1:
                raise Invalid(f"accumulate cannot be used with {state.engine.entry.name}")
        if self.config.get("accumulate", state.config["accumulate"]) != state.config["accumulate"]:
            state.check_no_window()
        config = {**state.config, **self.config}
        check_fit(config, state.engine.entry)
        if hardens(self) or not _same_round(state.config.get("workers"), config.get("workers")):
            state.round.check_not_open()
        if not self._computes():
            return None
        return rehearsal.rehearse(configs.recipe({**state.config, **self.config}), state.layout)

    def apply(self, state: SessionState) -> Change:
        if self._computes():
            state.end_line_search()
        state.patch(self.config)
        return Change(kind="hyper", moves=False, request={"config": dict(self.config)})


def _same_round(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> bool:
    """Say whether an open round can go on: how many are waited for, and how long, may change."""
    if before is None or after is None:
        return before is after
    free = {"count", "quorum", "deadline_s"}
    return {k: v for k, v in before.items() if k not in free} == {
        k: v for k, v in after.items() if k not in free
    }


def hardens(operation: Operation) -> bool:
    """Say whether a session that keeps its events in memory will no longer after this."""
    return isinstance(operation, Patch) and operation.config.get("durability", "memory") != "memory"


@dataclass(frozen=True, kw_only=True)
class PatchGroup:
    """Set hyperparameters of one group now."""

    index: int
    hyper: Mapping[str, Any]
    frame: None = None

    def check(self, state: SessionState, abandon: bool) -> None:
        count = len(state.engine.optimizer.param_groups)
        if not 0 <= self.index < count:
            raise Invalid(f"group {self.index}: the session has groups 0 to {count - 1}")
        state.check_line_search(abandon)
        if not self.hyper:
            raise Invalid("the body is empty: name what is to change")
        changed = self._normal(state)
        if changed.keys() - {"lr"}:
            rehearsal.rehearse_change(state.engine, self.index, changed)

    def _normal(self, state: SessionState) -> dict[str, Any]:
        where = f"groups[{self.index}]"
        normal: dict[str, Any] = state.engine.entry.normalise_change(
            from_json(self.hyper), where, state.engine.optimizer.param_groups[self.index]
        )
        return normal

    def apply(self, state: SessionState) -> Change:
        state.end_line_search()
        changes: list[dict[str, Any]] = [{} for _ in range(self.index)] + [self._normal(state)]
        state.engine.assign(changes)
        return Change(
            kind="hyper",
            moves=False,
            request={"group": self.index, "hyper": dict(self.hyper)},
            reply={"groups": state.engine.groups()},
        )


@dataclass(frozen=True, kw_only=True)
class AddGroup:
    """torch's add_param_group."""

    fields: Mapping[str, Any]
    params: Mapping[str, wire.Tensor]

    @property
    def frame(self) -> Buffers | None:
        return wire.encode({f"param/{name}": tensor for name, tensor in self.params.items()})

    def check(self, state: SessionState, abandon: bool) -> int | None:
        engine = state.engine
        if not engine.entry.groups:
            raise Invalid(f"{engine.entry.name} has one group only")
        if not self.params:
            raise Invalid("params is empty; a group needs at least one parameter")
        state.round.check_not_open()
        state.check_no_window()
        state.check_line_search(abandon)
        configs.check_count(len(self.params) + len(state.layout.slots))
        for name, tensor in self.params.items():
            wire.check_param_name(name)
            if name in state.layout.by_name:
                raise Conflict(f"params[{name!r}]: the session has a parameter of this name")
            if wire.dtype_of(tensor) != state.layout.dtype:
                raise Invalid(
                    f"params[{name!r}] is {wire.dtype_name(wire.dtype_of(tensor))}, "
                    f"the session is {wire.dtype_name(state.layout.dtype)}"
                )
        check_finite(self.params)
        fields = engine.entry.normalise_group(from_json(self.fields), "group")
        if engine.scheduler is not None:
            engine.scheduler.check_new_group()
        return rehearsal.rehearse_group(engine, fields, self.params)

    def apply(self, state: SessionState) -> Change:
        state.end_line_search()
        state.add_group(
            state.engine.entry.normalise_group(from_json(self.fields), "group"), self.params
        )
        return Change(
            kind="group",
            moves=True,
            request={"fields": dict(self.fields)},
            reply={"groups": state.engine.groups()},
        )


@dataclass(frozen=True, kw_only=True)
class SetScheduler:
    """Attach a scheduler as torch does, or take it away (None)."""

    spec: Any
    frame: None = None

    def _checked(self) -> dict[str, Any] | None:
        return None if self.spec is None else schedules.check(self.spec, "scheduler")

    def check(self, state: SessionState, abandon: bool) -> None:
        state.check_line_search(abandon)
        rehearsal.rehearse(replace(state.engine.recipe, scheduler=self._checked()), state.layout)

    def apply(self, state: SessionState) -> Change:
        state.end_line_search()
        spec = self._checked()
        state.set_scheduler(spec)
        return Change(
            kind="scheduler",
            moves=False,
            request={"spec": spec, "set": True},
            reply={"scheduler": scheduler_line(state), "groups": state.engine.groups()},
        )


@dataclass(frozen=True, kw_only=True)
class AdvanceScheduler:
    """scheduler.step(metrics)."""

    metrics: float | None = None
    recorded: Mapping[str, Any] | None = None
    frame: None = None

    def check(self, state: SessionState, abandon: bool) -> None:
        scheduler = state.engine.scheduler
        if scheduler is None:
            raise Conflict("the session has no scheduler; PUT one first")
        if state.engine.advance == "step":
            raise Conflict("the scheduler advances with each update: its advance is 'step'")
        scheduler.check_metrics(self.metrics)
        state.check_line_search(abandon)

    def apply(self, state: SessionState) -> Change:
        state.end_line_search()
        moved = state.engine.advance_scheduler(self.metrics, self.recorded)
        return Change(
            kind="scheduler",
            moves=False,
            request={"metrics": self.metrics},
            outcome={"moved": moved},
            reply={"scheduler": scheduler_line(state), "groups": state.engine.groups()},
        )


@dataclass(frozen=True, kw_only=True)
class PutMetrics:
    """Values of a version that came later."""

    version: int
    metrics: Mapping[str, float]
    frame: None = None

    def check(self, state: SessionState, abandon: bool) -> None:
        if not self.metrics:
            raise Invalid("metrics is empty: name what is to be noted")
        if not 0 <= self.version <= state.version:
            raise Invalid(f"version is {self.version}, the session has 0 to {state.version}")

    def apply(self, state: SessionState) -> Change:
        state.add_metrics(self.version, self.metrics)
        request = {"version": self.version, "metrics": dict(self.metrics)}
        return Change(kind="metrics", moves=False, request=request)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Replace everything but the session's identity by a state file."""

    data: bytes | bytearray | memoryview
    decoded: list[Any] = field(default_factory=list)

    @property
    def frame(self) -> Buffers | None:
        return [memoryview(self.data)]

    def check(self, state: SessionState, abandon: bool) -> int | None:
        state.round.check_not_open()
        state.check_line_search(abandon)
        frame = frames.decode(self.data)
        config, engine = read_engine(frame, state.config["device"])
        self.decoded.append((frame, config, engine))
        return engine.nbytes()

    def apply(self, state: SessionState) -> Change:
        if not self.decoded:
            frame = frames.decode(self.data)
            self.decoded.append((frame, *read_engine(frame, state.config["device"])))
        frame, config, engine = self.decoded.pop()
        updates = frame.meta["updates"] - state.updates
        # What this server promises is not the file's to say.
        stays = {name: state.config[name] for name in ("durability", "ttl_s")}
        state.replace_by({**config, **stays}, engine)
        state.inexact = state.inexact or frames.inexact(frame)
        return Change(kind="import", moves=True, updates=updates)


def of_event(event: Event) -> Operation | None:
    """Return the operation that made ``event``; None for steps and for what changes no state."""
    request, outcome = event.record.get("request", {}), event.record.get("outcome", {})
    if event.payload is None and event.kind in WITH_PAYLOAD:
        raise Internal(f"session {event.key.session!r}: the payload of event {event.lsn} is gone")
    data = event.payload.read() if event.payload is not None else b""
    match event.kind:
        case "params":
            return SetParams(params=_params(data))
        case "hyper" if "config" in request:
            return Patch(config=request["config"])
        case "hyper":
            return PatchGroup(index=request["group"], hyper=request["hyper"])
        case "group":
            return AddGroup(fields=request.get("fields", {}), params=_params(data))
        case "scheduler" if "set" in request:
            return SetScheduler(spec=request.get("spec"))
        case "scheduler":
            return AdvanceScheduler(metrics=request.get("metrics"), recorded=outcome)
        case "metrics":
            return PutMetrics(version=request["version"], metrics=request["metrics"])
        case "import":
            return Import(data=data)
        case "rollback":
            return Rollback(version=request["version"], data=data)
        case _:
            return None


def _params(data: bytes) -> dict[str, wire.Tensor]:
    tensors, _ = wire.decode(data)
    return {name.removeprefix("param/"): tensor for name, tensor in tensors.items()}
