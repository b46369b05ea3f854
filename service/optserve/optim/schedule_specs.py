"""A scheduler as JSON: checked field by field, spelled as torch spells it, with torch's defaults.

What comes out says everything that will act and nothing else, and goes in again unchanged. It needs
no optimizer, so the number of groups and the kind of momentum are checked by torch at build.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import count, pairwise
from typing import Any

from optserve.optim import expressions
from optserve.optim.expressions import number, shown
from optserve.optim.schedule_catalogue import find
from optserve.optim.schedule_entry import (
    INTEGER_LIMIT,
    MILESTONES_LIMIT,
    SCHEDULERS_LIMIT,
    Entry,
    Field,
)
from optserve_client.errors import Invalid, TorchRefused

#: Levels of schedulers within schedulers.
DEPTH_LIMIT = 8
#: Values in a list with one per parameter group.
GROUPS_LIMIT = 1000

Spec = dict[str, Any]


def normalise(spec: Any, where: str = "scheduler") -> Spec:
    """Return the normalised specification, or raise Invalid naming the field.

    Raises TorchRefused for what torch builds but cannot step.
    """
    checked = _scheduler(spec, where, 1, count(1))
    given = spec if isinstance(spec, Mapping) else {}
    advance = given.get("advance", "manual")
    if advance not in ("manual", "step"):
        raise _invalid(f"{where}.advance", f'must be "manual" or "step", got {shown(advance)}')
    checked["advance"] = advance
    follows = checked["name"] == "ReduceLROnPlateau" and advance == "step"
    if follows:
        monitor = given.get("monitor", "loss")
        if not isinstance(monitor, str) or not 0 < len(monitor) <= 256:
            raise _invalid(
                f"{where}.monitor", f'must be "loss" or the name of a metric, got {shown(monitor)}'
            )
        checked["monitor"] = monitor
    elif given.get("monitor") is not None:
        raise _invalid(
            f"{where}.monitor", 'has no effect without ReduceLROnPlateau and advance "step"'
        )
    return checked


def walk(spec: Mapping[str, Any], where: str = "scheduler") -> Iterator[tuple[Spec, str]]:
    """Yield each scheduler of a normalised specification with its path, the outermost first."""
    yield dict(spec), where
    for i, child in enumerate(spec.get("schedulers", ())):
        yield from walk(child, f"{where}.schedulers[{i}]")


def per_group_lists(spec: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields of one scheduler that list a value per group, with their lengths."""
    return {
        name: len(spec[name])
        for name, field in find(spec["name"]).fields.items()
        if field.per_group and isinstance(spec.get(name), list)
    }


def _invalid(field: str, why: str) -> Invalid:
    return Invalid(f"{field} {why}", field=field)


def _scheduler(spec: Any, where: str, depth: int, seen: Iterator[int]) -> Spec:
    if depth > DEPTH_LIMIT:
        raise _invalid(where, f"is nested too deeply: the limit is {DEPTH_LIMIT} levels")
    if next(seen) > SCHEDULERS_LIMIT:
        raise _invalid(where, f"is one scheduler too many: the limit is {SCHEDULERS_LIMIT}")
    if isinstance(spec, list):
        spec = {"name": "ChainedScheduler", "schedulers": spec}
    if not isinstance(spec, Mapping):
        raise _invalid(
            where, f'must be an object like {{"name": "StepLR", ...}}, got {shown(spec)}'
        )
    if "name" not in spec:
        raise _invalid(f"{where}.name", "is required")
    entry = find(spec["name"], f"{where}.name")
    for key in spec:
        _known(key, entry, where, outermost=depth == 1)
    effective = _without_ineffective(spec, entry, where)
    checked: Spec = {"name": entry.name}
    for name, field in entry.fields.items():
        if name not in effective:
            continue
        path = f"{where}.{name}"
        if name not in spec and name not in entry.defaults:
            raise _invalid(path, f"is required by {entry.name}")
        value = spec.get(name, entry.defaults.get(name))
        if value is None and name in entry.defaults and entry.defaults[name] is None:
            continue
        checked[name] = _value(value, field, path, depth, seen)
    _check_milestones(checked, entry, where)
    return checked


def _known(key: Any, entry: Entry, where: str, *, outermost: bool) -> None:
    if key == "name" or key in entry.fields:
        return
    if key in ("advance", "monitor"):
        if outermost:
            return
        raise _invalid(f"{where}.{key}", "is a field of the outermost scheduler only")
    path = f"{where}.{str(key)[:80]}"
    if key == "last_epoch":
        raise _invalid(path, "cannot be given: where a scheduler stands is part of its state")
    by_lower = {name.lower(): name for name in entry.fields}
    close = difflib.get_close_matches(str(key)[:80].lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[close[0]]}?" if close else f"it has {', '.join(entry.fields)}"
    raise _invalid(path, f"is not a field of {entry.name}: {hint}")


def _without_ineffective(spec: Mapping[str, Any], entry: Entry, where: str) -> set[str]:
    """Return the fields that act; refuse others unless they say only what torch's default says."""
    idle: dict[str, str] = {}
    if entry.cycles_momentum and spec.get("cycle_momentum") is False:
        idle |= dict.fromkeys(("base_momentum", "max_momentum"), "cycle_momentum is false")
    if entry.name == "CyclicLR" and spec.get("scale_fn") is not None:
        idle |= dict.fromkeys(("mode", "gamma"), "scale_fn is given")
    elif entry.name == "CyclicLR":
        idle["scale_mode"] = "scale_fn is not given"
        if spec.get("mode") != "exp_range":
            idle["gamma"] = 'mode is not "exp_range"'
    if entry.name == "OneCycleLR" and spec.get("total_steps") is not None:
        idle |= dict.fromkeys(("epochs", "steps_per_epoch"), "total_steps is given")
    for name, why in idle.items():
        if name in spec and spec[name] != entry.defaults[name]:
            raise _invalid(f"{where}.{name}", f"has no effect: {why}")
    return set(entry.fields) - set(idle)


def _value(value: Any, field: Field, path: str, depth: int, seen: Iterator[int]) -> Any:
    """Return a normalised value of ``field``, or of a list of them."""
    if field.per_group and isinstance(value, list):
        if not 0 < len(value) <= GROUPS_LIMIT:
            raise _invalid(
                path,
                f"must have one value per parameter group, 1 to {GROUPS_LIMIT}, got {shown(value)}",
            )
        return [_value_of_one(v, field, f"{path}[{i}]", depth, seen) for i, v in enumerate(value)]
    return _value_of_one(value, field, path, depth, seen)


def _value_of_one(value: Any, field: Field, path: str, depth: int, seen: Iterator[int]) -> Any:
    match field.kind:
        case "number":
            result = number(value, path)
            if not field.admits(result):
                raise _invalid(path, f"must be {field.bound}, got {shown(value)}")
            return result
        case "integer":
            return _integer(value, path, int(field.least), int(field.most))
        case "boolean":
            if not isinstance(value, bool):
                raise _invalid(path, f"must be true or false, got {shown(value)}")
            return value
        case "enum":
            if not isinstance(value, str) or value not in field.choices:
                choices = " or ".join(map(shown, field.choices))
                raise _invalid(path, f"must be {choices}, got {shown(value)}")
            return value
        case "function":
            return expressions.check(value, field.variable, path)
        case "milestones":
            if not isinstance(value, list) or len(value) > MILESTONES_LIMIT:
                raise _invalid(
                    path,
                    f"must be a list of at most {MILESTONES_LIMIT} integers, got {shown(value)}",
                )
            return [_integer(v, f"{path}[{i}]", 1, INTEGER_LIMIT) for i, v in enumerate(value)]
        case "schedulers":
            if not isinstance(value, list) or not 0 < len(value) <= SCHEDULERS_LIMIT:
                raise _invalid(
                    path,
                    f"must be a list of 1 to {SCHEDULERS_LIMIT} schedulers, got {shown(value)}",
                )
            return [_scheduler(v, f"{path}[{i}]", depth + 1, seen) for i, v in enumerate(value)]


def _integer(value: Any, path: str, least: int, most: int) -> int:
    """Return an integer; 50.0 is one too, since JSON does not tell them apart."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise _invalid(path, f"must be an integer, got {shown(value)}")
    if not least <= value <= most:
        bound = f">= {least}" if value < least else f"<= {most}"
        raise _invalid(path, f"must be {bound}, got {shown(value)}")
    return int(value)


def _check_milestones(checked: Spec, entry: Entry, where: str) -> None:
    if "milestones" not in checked:
        return
    milestones, path = checked["milestones"], f"{where}.milestones"
    # At two equal milestones SequentialLR skips a scheduler; MultiStepLR decays twice.
    strictly = entry.composite
    for i, (a, b) in enumerate(pairwise(milestones)):
        if b < a or (strictly and b == a):
            bound = f"{'>' if strictly else '>='} {path}[{i}] = {a}"
            raise _invalid(f"{path}[{i + 1}]", f"must be {bound}, got {b}")
    if not entry.composite:
        return
    if len(milestones) != (need := len(checked["schedulers"]) - 1):
        raise _invalid(
            path,
            f"must have one value less than schedulers, so {need}, got {len(milestones)}",
        )
    for i, child in enumerate(checked["schedulers"][1:], start=1):
        if find(child["name"]).composite:
            raise TorchRefused(
                f"{where}.schedulers[{i}] is a {child['name']}, which torch's SequentialLR cannot "
                "start at a milestone (NotImplementedError); only its first scheduler may be one",
                field=f"{where}.schedulers[{i}]",
            )
