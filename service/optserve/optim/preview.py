"""Look ahead: what a schedule will do to lr and momentum, on copies that nothing else sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optserve.optim import schedule_specs, schedules
from optserve.optim.expressions import number, shown
from optserve.optim.schedule_binding import Bare
from optserve_client.errors import Invalid

STEPS_LIMIT = 10_000
#: Steps x groups x schedulers: about as many values are computed.
WORK_LIMIT = 100_000

Row = list[dict[str, Any]]


def preview(
    spec: Any,
    groups: Sequence[Mapping[str, Any]],
    steps: int,
    state: Mapping[str, Any] | None = None,
    metrics: Any = None,
) -> list[Row]:
    """Return ``steps`` rows: the groups as they are now, after one scheduler step, after two, ...

    So row ``i`` is what the ``i``-th update from now uses, if a scheduler step follows each update.
    A row holds for each group ``lr``, and ``momentum`` or ``betas`` if the schedule moves it.

    ``groups`` are hyperparameters as in param_groups, without params. Without ``state`` the
    schedule is new, and row 0 is what building it makes of them; with the ``state`` of a scheduler,
    they are its groups as they stand. ``metrics`` are what ReduceLROnPlateau gets, one per step,
    the last one from then on; without them one constant metric is assumed: the best so far, or 1.

    Raises Invalid, TorchRefused, or SchedulerFailed naming the step that cannot be computed.
    """
    checked = schedule_specs.normalise(spec) if state is not None else schedules.check(spec)
    _check_size(steps, len(groups), sum(1 for _ in schedule_specs.walk(checked)))
    copies = [_copy(group, f"groups[{i}]") for i, group in enumerate(groups)]
    before = [dict(copy) for copy in copies]
    scheduler = schedules.build(checked, Bare(param_groups=copies, defaults=dict(copies[0])))
    if state is not None:
        scheduler.load(state)
        for copy, values in zip(copies, before, strict=True):
            copy.clear()
            copy.update(values)
    given = _metrics(scheduler, metrics, steps)
    moving = _moving(checked, copies)
    rows = [_row(copies, moving)]
    for i in range(steps - 1):
        scheduler.step(given[min(i, len(given) - 1)] if given else None)
        rows.append(_row(copies, moving))
    return rows


def _check_size(steps: Any, groups: int, schedulers: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= STEPS_LIMIT:
        raise Invalid(
            f"steps must be an integer in [1, {STEPS_LIMIT}], got {shown(steps)}", field="steps"
        )
    if not groups:
        raise Invalid("groups must not be empty", field="groups")
    if (work := steps * groups * schedulers) > WORK_LIMIT:
        raise Invalid(
            f"steps x groups x schedulers must be <= {WORK_LIMIT}, "
            f"got {steps} x {groups} x {schedulers} = {work}",
            field="steps",
        )


def _copy(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "lr" not in group:
        raise Invalid(f"{where}.lr is required", field=f"{where}.lr")
    number(group["lr"], f"{where}.lr")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}


def _metrics(scheduler: schedules.Scheduler, metrics: Any, steps: int) -> list[float]:
    if metrics is None:
        return [scheduler.best_or(1.0)] if scheduler.needs_metrics else []
    if not scheduler.needs_metrics:
        raise Invalid(f"metrics has no effect on {scheduler.name}", field="metrics")
    if not isinstance(metrics, list):
        raise Invalid(f"metrics must be a list of numbers, got {shown(metrics)}", field="metrics")
    if not 1 <= len(metrics) <= steps:
        raise Invalid(
            f"metrics must have 1 to {steps} values, one per step, got {len(metrics)}",
            field="metrics",
        )
    return [number(value, f"metrics[{i}]") for i, value in enumerate(metrics)]


def _moving(spec: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the hyperparameters that the schedule writes."""
    cycles = any(one.get("cycle_momentum") for one, _ in schedule_specs.walk(spec))
    if not cycles:
        return ["lr"]
    return ["lr", "betas" if "betas" in groups[0] else "momentum"]


def _row(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Row:
    return [
        {n: list(group[n]) if isinstance(group[n], tuple) else group[n] for n in names}
        for group in groups
    ]
