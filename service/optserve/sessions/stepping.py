"""One step request against one session: what must hold, what changes, what is answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.optim.engine import Outcome
from optserve.optim.gradients import Inspected
from optserve.optim.hyper import json_value
from optserve.sessions import workers
from optserve.sessions.finite import check_finite
from optserve.sessions.intake import Step
from optserve.sessions.state import SessionState, monitored
from optserve.store import Payload
from optserve_client.errors import Conflict, Invalid, StaleGradient, VersionConflict


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of a session that is applied but not yet committed."""

    kind: str
    #: The live params may differ: this makes a version.
    moves: bool
    #: Optimizer updates applied.
    updates: int = 0
    #: What the request asked for, as far as the payload does not say it: for replay and history.
    request: Mapping[str, Any] = field(default_factory=dict)
    #: What came out, for replay.
    outcome: Mapping[str, Any] = field(default_factory=dict)
    #: Members of the reply beside the counters, as strict JSON.
    reply: Mapping[str, Any] = field(default_factory=dict)
    payload: Payload | None = None
    loss: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A step that was checked: nothing has changed yet, and nothing more can be refused by us."""

    step: Step
    changes: list[dict[str, Any]]
    #: None for LBFGS, which looks at its gradient itself.
    inspected: Inspected | None
    #: Versions that the session is ahead of the gradient; None: nobody counts.
    staleness: int | None = None
    #: What the gradient is multiplied by.
    weight: float = 1.0


def prepare(state: SessionState, step: Step) -> Prepared:
    """Check ``step`` against the session; raises without having changed anything."""
    fields, engine = step.fields, state.engine
    check_fits(state, step)
    staleness, weight = _age(state, step)
    if step.params is not None and engine.window.steps > 1:
        raise Conflict(
            f"params cannot come with a step while accumulate is {engine.window.steps}: "
            "use PUT params between two windows",
            version=state.version,
        )
    if step.params is not None:
        check_finite(step.params)
    changes = engine.check_change(fields.groups or [])
    closing = engine.window.count + 1 >= engine.window.steps
    metric = monitored(engine.monitor, fields.loss, fields.metrics)
    if engine.advance == "step" and engine.monitor and closing and metric is None:
        raise Invalid(f"the scheduler follows {engine.monitor!r}, which this step does not send")
    if step.payload is None and closing:
        # What fails half-way cannot be replayed: find out before anything has changed.
        engine.check_advance(metric)
    if engine.line_search is None:
        if fields.abandon:
            raise Invalid(f"abandon: {engine.entry.name} has no line search")
        return Prepared(
            step=step,
            changes=changes,
            inspected=inspect(state, step),
            staleness=staleness,
            weight=weight,
        )
    _check_evaluation(state, step)
    return Prepared(step=step, changes=changes, inspected=None)


def check_fits(state: SessionState, step: Step) -> None:
    """Refuse a step that was read for another shape, generation or mode of the session."""
    engine, expected = state.engine, step.expected
    if (
        expected.layout != engine.layout
        or expected.sparse != engine.recipe.sparse
        or (step.buffer.layout != engine.pool.layout and step.passed is None)
        or (step.passed is not None and workers.rounds(state.config) is None)
        or expected.kind != workers.kind(state.config)
    ):
        raise Conflict("the session's params changed while the gradient was on its way")
    state.check_generation(step.fields.generation)


def inspect(state: SessionState, step: Step) -> Inspected:
    """Unscale and measure the gradient; what workers changed is minus it."""
    return state.engine.inspect(step, step.fields.loss_scale, negate=step.expected.kind == "delta")


def _age(state: SessionState, step: Step) -> tuple[int | None, float]:
    """Return staleness and weight; refuse a gradient of a version that it must not be of."""
    fields, mode = step.fields, state.config.get("workers")
    if fields.weight is not None:  # wait_s is a bound, and nothing is waited for here
        raise Invalid("weight has no effect outside of rounds", field="weight")
    if mode is None:
        if fields.base_version is not None and fields.base_version != state.version:
            raise VersionConflict(
                f"base_version is {fields.base_version}, the session's version is {state.version}",
                version=state.version,
            )
        return None, 1.0
    if step.params is not None:
        raise Conflict(
            "params cannot come with a push of one of several workers: use PUT params",
            version=state.version,
        )
    most = mode["max_staleness"]
    if fields.base_version is None:
        if most is not None:
            raise Invalid(
                "base_version is missing: it tells how stale the gradient is", field="base_version"
            )
        return None, 1.0
    staleness = check_base(state, fields.base_version)
    if most is not None and staleness > most and mode["on_stale"] == "reject":
        raise stale(state, fields.base_version, f"max_staleness is {most}")
    return staleness, workers.weight_of(staleness, mode)


def check_base(state: SessionState, base_version: int) -> int:
    """Return how many versions the session is ahead of ``base_version``."""
    if base_version > state.version:
        raise VersionConflict(
            f"base_version is {base_version}, the session's version is {state.version}",
            version=state.version,
        )
    return state.version - base_version


def stale(state: SessionState, base_version: int, why: str) -> StaleGradient:
    return StaleGradient(
        f"base_version is {base_version}, the session's version is {state.version}; {why}",
        version=state.version,
        base_version=base_version,
        updates=state.updates,
    )


def _check_evaluation(state: SessionState, step: Step) -> None:
    fields, name = step.fields, state.engine.entry.name
    if fields.loss is None:
        raise Invalid(f"loss is missing: {name} needs loss and gradients at the same params")
    if fields.loss_scale is not None:
        raise Invalid(f"loss_scale cannot be used with {name}")
    if fields.return_ != "params":
        raise Invalid(f"return must be 'params' with {name}, got {fields.return_!r}")
    if step.params is not None or fields.groups:
        state.check_line_search(fields.abandon)
    state.engine.check_finite(step)


def apply(
    state: SessionState, prepared: Prepared, recorded: Mapping[str, Any] | None = None
) -> Change:
    """Change the session by a prepared step. Whatever raises leaves it half-changed."""
    step, inspected = prepared.step, prepared.inspected
    request = {
        "groups": prepared.changes,
        "loss": step.fields.loss,
        "metrics": step.fields.metrics,
    }
    if prepared.staleness is not None:
        request["base_version"] = step.fields.base_version
    extra: dict[str, Any] = {}
    common: dict[str, Any] = {"request": request, "loss": step.fields.loss}
    if inspected is not None and inspected.nonfinite:
        state.take(step, prepared.changes)
        return Change(
            kind="skip",
            moves=step.params is not None,
            payload=step.payload if step.params is not None else None,
            reply=reply_of(
                state,
                Outcome(applied=False, groups=state.engine.groups(), **state.engine.window_state()),
                skipped="nonfinite",
                detail=inspected.nonfinite,
            ),
            **common,
        )
    if inspected is None:
        outcome = state.evaluate(step, prepared.changes, recorded)
        kind, extra = "evaluate", {"need": None if outcome.applied else "evaluate"}
    else:
        weight = prepared.weight if recorded is None else recorded.get("weight", 1.0)
        outcome = state.step(step, inspected, prepared.changes, recorded, weight)
        kind = "step" if outcome.applied else "contribution"
        if prepared.staleness is not None:
            extra = {"staleness": prepared.staleness, "weight": weight}
    return Change(
        kind=kind,
        moves=outcome.applied,
        updates=int(outcome.applied),
        # A coefficient that no JSON holds is left out: replay then computes the same one again.
        outcome={
            "clip_coef": finite(outcome.clip_coef),
            "moved": outcome.moved,
            "weight": prepared.weight if prepared.weight != 1.0 else None,
        },
        reply=reply_of(state, outcome, **extra),
        payload=step.payload,
        grad_norm=outcome.grad_norm,
        **common,
    )


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def reply_of(state: SessionState, outcome: Outcome, **extra: Any) -> dict[str, Any]:
    """Return what a reply to a step says beside the counters, as strict JSON."""
    engine = state.engine
    reply: dict[str, Any] = {
        "applied": outcome.applied,
        "skipped": None,
        "groups": list(outcome.groups),
        "scheduler": scheduler_line(state),
        "grad_norm": json_value(outcome.grad_norm),
        "clip_coef": json_value(outcome.clip_coef),
        **extra,
    }
    if engine.window.steps > 1:
        reply["accumulated"] = outcome.accumulated
    return reply


def scheduler_line(state: SessionState) -> dict[str, Any] | None:
    """Return what a reply says of the scheduler; ``next_lr`` is per group, for the next update."""
    engine = state.engine
    if engine.scheduler is None:
        return None
    return {
        "advance": engine.advance,
        "last_epoch": engine.scheduler.last_epoch,
        "next_lr": json_value(engine.learning_rates()),
    }
