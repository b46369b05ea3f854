"""One update of several workers: a push goes in, the round closes or fails.

Each is one event, applied by the functions here, live and in a replay. Closing reads the pushes
back from the journal and combines them in the order of their workers' names, so that the order in
which they arrived changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optserve.optim.engine import Outcome
from optserve.optim.hyper import from_json
from optserve.optim.reduce import Reduction
from optserve.sessions import stepping, workers
from optserve.sessions.contributed import opened
from optserve.sessions.identity import Identity
from optserve.sessions.intake import Step
from optserve.sessions.round import Contribution
from optserve.sessions.state import SessionState, expected_of, monitored
from optserve.sessions.stepping import Change
from optserve_client.errors import Conflict, Invalid, Nonfinite


def rules(state: SessionState) -> Mapping[str, Any]:
    """Return the session's ``workers``, which say how a round goes."""
    found = workers.rounds(state.config)
    assert found is not None, "the session has no rounds"
    return found


def push(state: SessionState, step: Step, identity: Identity) -> Change:
    """Return the change that one worker's push is; no number changes before the round closes.

    Raises StaleGradient for one that comes too late, Conflict for a second one.
    """
    fields, engine, how = step.fields, state.engine, rules(state)
    stepping.check_fits(state, step)
    if step.payload is None:  # read when the session had no rounds
        raise Conflict("the session's workers changed while the gradient was on its way")
    if identity.worker is None or identity.seq is None:
        raise Invalid("a push into a round needs worker and seq", field="worker")
    for name, given in (("dry_run", fields.dry_run), ("abandon", fields.abandon)):
        if given:
            raise Invalid(f"{name} cannot be used in a round", field=name)
    _check_weight(fields.weight, how["reduce"])
    if fields.base_version is None:
        raise Invalid(
            "base_version is missing: it tells for which round the push is", field="base_version"
        )
    if stepping.check_base(state, fields.base_version):
        raise stepping.stale(state, fields.base_version, "the round is over")
    if step.params is not None:
        raise Conflict(
            "params cannot come with a push into a round: use PUT params between two rounds",
            version=state.version,
        )
    if identity.worker in state.round.contributions:
        raise Conflict(
            f"worker {identity.worker!r} has pushed into round {state.round.number} already",
            version=state.version,
        )
    metric = monitored(engine.monitor, fields.loss, fields.metrics)
    if engine.advance == "step" and engine.monitor and metric is None:
        raise Invalid(f"the scheduler follows {engine.monitor!r}, which this push does not send")
    changes = engine.check_change(fields.groups or [])
    fault = _fault(state, step)
    if fault is not None:
        outcome = Outcome(applied=False, groups=engine.groups())
        return Change(
            kind="skip",
            moves=False,
            request={"groups": [], "loss": fields.loss, "metrics": fields.metrics},
            reply=stepping.reply_of(state, outcome, skipped="nonfinite", detail=fault),
            loss=fields.loss,
        )
    epoch, _ = state.ledger.position(identity.worker)
    outcome = Outcome(applied=False, groups=engine.groups())
    return Change(
        kind="contribution",
        moves=False,
        request={
            "round": state.round.number,
            "epoch": epoch,
            "base_version": fields.base_version,
            "groups": changes,
            "loss": fields.loss,
            "metrics": fields.metrics,
            "weight": fields.weight,
        },
        reply=stepping.reply_of(state, outcome),
        payload=step.payload,
        loss=fields.loss,
    )


def _fault(state: SessionState, step: Step) -> str | None:
    """Return what is not finite in a push that is to be skipped; raise Nonfinite if it is not."""
    if step.passed is None:
        return stepping.inspect(state, step).nonfinite
    fault = step.passed.fault
    if fault and step.fields.loss_scale is None and state.engine.recipe.nonfinite == "reject":
        raise Nonfinite(fault)
    return fault


def _check_weight(weight: float | None, reduce: str) -> None:
    if reduce == "weighted_mean" and weight is None:
        raise Invalid("weight is missing: the session's reduce is 'weighted_mean'", field="weight")
    if reduce != "weighted_mean" and weight is not None:
        raise Invalid(f"weight has no effect with reduce {reduce!r}", field="weight")


def progress(state: SessionState) -> dict[str, Any]:
    """Return how far the open round is."""
    return {
        "number": state.round.number,
        "base_version": state.version,
        "contributed": [push.worker for push in state.round.in_order()],
        "count": rules(state)["count"],
        "deadline_at": state.round.deadline(rules(state)),
    }


def close(state: SessionState, closed_by: str, recorded: Mapping[str, Any] | None = None) -> Change:
    """Combine the pushes of the open round and update the params. Whatever raises leaves the state
    half-changed. ``closed_by``: ``count`` or ``deadline``."""
    pushes, how, engine = state.round.in_order(), rules(state), state.engine
    expected = expected_of(state)
    loss, metrics, groups = _mean_loss(pushes), _mean_metrics(pushes), _groups(pushes)
    changes = [from_json(change) for change in groups]
    buffer = engine.pool.lease()
    try:
        with opened(pushes, expected) as sources:
            inspected = engine.combine(
                sources, buffer, _reduction(how, pushes), negate=expected.kind == "delta"
            )
        engine.assign(changes)
        if inspected.nonfinite:  # finite pushes can have an infinite sum
            outcome = Outcome(applied=False, groups=engine.groups())
            said = {"skipped": "nonfinite", "detail": inspected.nonfinite}
        else:
            outcome, said = state.update(inspected, loss, metrics, recorded), {}
    finally:
        buffer.release()
    names = [push.worker for push in pushes]
    report = {
        "number": state.round.number,
        "base_version": state.version,
        "workers": names,
        "missing": max(how["count"] - len(names), 0),
        "closed_by": closed_by,
    }
    return Change(
        kind="close",
        moves=True,
        updates=int(outcome.applied),
        request={
            "round": state.round.number,
            "pushes": [[push.worker, push.epoch, push.seq] for push in pushes],
            "groups": groups,
            "loss": loss,
            "metrics": metrics,
        },
        outcome={"clip_coef": stepping.finite(outcome.clip_coef), "moved": outcome.moved},
        reply=stepping.reply_of(state, outcome, **said, round=report),
        loss=loss,
        grad_norm=outcome.grad_norm,
    )


def fail(state: SessionState, why: str) -> Change:
    """Drop the pushes of the open round."""
    names = [push.worker for push in state.round.in_order()]
    return Change(
        kind="fail",
        moves=False,
        request={"round": state.round.number, "workers": names, "why": why},
    )


def _reduction(how: Mapping[str, Any], pushes: Sequence[Contribution]) -> Reduction:
    name = how["reduce"]
    if name == "weighted_mean":
        return Reduction(name=name, weights=[push.request["weight"] for push in pushes])
    trim = workers.trimmed(how, len(pushes)) if name == "trimmed_mean" else 0
    return Reduction(name=name, trim=trim)


def _mean_loss(pushes: Sequence[Contribution]) -> float | None:
    return _mean([p.request.get("loss") for p in pushes])


def _mean_metrics(pushes: Sequence[Contribution]) -> dict[str, float]:
    """Return the mean of each metric over the pushes that brought it."""
    names = dict.fromkeys(name for push in pushes for name in push.request.get("metrics", {}))
    found = {name: _mean([p.request["metrics"].get(name) for p in pushes]) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return stepping.finite(sum(given) / len(given)) if given else None


def _groups(pushes: Sequence[Contribution]) -> list[dict[str, Any]]:
    """Return what the pushes assign to ``param_groups``: of several, the last in order holds."""
    merged: list[dict[str, Any]] = []
    for push_ in pushes:
        for i, change in enumerate(push_.request.get("groups", [])):
            merged += [{}] * (i + 1 - len(merged))
            merged[i] = {**merged[i], **change}
    return merged
