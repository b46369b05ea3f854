"""torch's scheduler classes, bound to groups that they may write, and their state as JSON.

The classes are torch's own; only what they are bound to is ours: a stand-in optimizer that shows
the real one's ``param_groups`` and ``defaults``. So nothing patches the real optimizer's ``step``,
its class may be a wrapper, and torch's warning about the order of two ``step`` calls cannot arise.

The state is the few attributes that move (:data:`_MOVING`). All others follow from the
specification, which stands beside the state wherever it is kept; so functions, tables and
MultiStepLR's Counter never need to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from optserve.optim import expressions
from optserve.optim.expressions import number, shown
from optserve.optim.schedule_catalogue import find
from optserve.optim.schedule_specs import Spec
from optserve_client.errors import Invalid

#: What moves in torch's schedulers (or depends on the groups they met), by its type.
_MOVING: Mapping[str, type] = {
    "last_epoch": int,
    "_step_count": int,
    "T_cur": int,
    "T_i": int,
    "cooldown_counter": int,
    "num_bad_epochs": int,
    "best": float,
    "_last_lr": list,
    "base_lrs": list,
    "max_lrs": list,
    "min_lrs": list,
    "base_momentums": list,
    "max_momentums": list,
}
_INFINITY = {"Infinity": math.inf, "-Infinity": -math.inf}


class Groups(Protocol):
    """What a scheduler needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def defaults(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Bare:
    """Groups of hyperparameters without params: for dry runs and previews."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]


class StandIn(torch.optim.Optimizer):
    """The optimizer that torch's schedulers see; it is never stepped.

    ``param_groups`` is looked up each time, since load_state_dict gives an optimizer a new list.
    """

    def __init__(self, groups: Groups) -> None:
        # Not Optimizer.__init__, which would want tensors and count an optimizer in use.
        self._groups = groups
        #: Tells torch that an optimizer step came before the scheduler's.
        self._opt_called = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._groups.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._groups.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One of torch's schedulers, its specification, and those that it is made of."""

    made: Any
    spec: Spec
    where: str
    children: tuple[Node, ...]

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()


def construct(spec: Spec, standin: StandIn, where: str) -> Node:
    """Call torch's constructors in the order of the text, inner ones before outer ones."""
    entry = find(spec["name"])
    arguments: dict[str, Any] = {}
    children: tuple[Node, ...] = ()
    for name, value in spec.items():
        field = entry.fields.get(name)
        if field is None:
            continue
        path = f"{where}.{name}"
        if field.kind == "schedulers":
            children = tuple(
                construct(child, standin, f"{path}[{i}]") for i, child in enumerate(value)
            )
            arguments[name] = [child.made for child in children]
        elif field.kind == "function" and isinstance(value, list):
            arguments[name] = [
                expressions.make(one, field.variable, f"{path}[{i}]") for i, one in enumerate(value)
            ]
        elif field.kind == "function":
            arguments[name] = expressions.make(value, field.variable, path)
        else:
            arguments[name] = list(value) if isinstance(value, list) else value
    made = entry.made_by(optimizer=standin, **arguments)
    return Node(made=made, spec=spec, where=where, children=children)


def dump(node: Node) -> dict[str, Any]:
    """Return the state of ``node`` and what it is made of, as strict JSON."""
    state: dict[str, Any] = {"name": node.spec["name"]}
    for name in _MOVING:
        if name in node.made.__dict__:
            value = node.made.__dict__[name]
            if name == "best" and math.isinf(value):
                value = "Infinity" if value > 0 else "-Infinity"
            state[name] = list(value) if isinstance(value, list) else value
    if node.children:
        state["schedulers"] = [dump(child) for child in node.children]
    return state


def read(node: Node, state: Any, where: str, groups: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each scheduler of torch's with the attributes that ``state`` gives it.

    Raises Invalid, naming the place, if ``state`` is not one of this specification and ``groups``.
    """
    names = {name for name in _MOVING if name in node.made.__dict__}
    expected = {"name", *names, *(("schedulers",) if node.children else ())}
    if not isinstance(state, Mapping) or set(state) != expected:
        raise Invalid(f"{where} must be an object with {', '.join(sorted(expected))}", field=where)
    if state["name"] != node.spec["name"]:
        raise Invalid(
            f"{where}.name must be {node.spec['name']}, got {shown(state['name'])}", field=where
        )
    values = {n: _value(state[n], _MOVING[n], f"{where}.{n}", groups) for n in names}
    yield node.made, values
    if node.children:
        children = state["schedulers"]
        if not isinstance(children, list) or len(children) != len(node.children):
            raise Invalid(f"{where}.schedulers must have {len(node.children)} items", field=where)
        for i, (child, inner) in enumerate(zip(node.children, children, strict=True)):
            yield from read(child, inner, f"{where}.schedulers[{i}]", groups)


def _value(value: Any, kind: type, where: str, groups: int) -> Any:
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Invalid(f"{where} must be an integer, got {shown(value)}", field=where)
        return value
    if kind is float:
        if isinstance(value, str) and value in _INFINITY:
            return _INFINITY[value]
        return number(value, where)
    if not isinstance(value, list) or len(value) != groups:
        raise Invalid(f"{where} must have {groups} values, one per group", field=where)
    return [number(v, f"{where}[{i}]") for i, v in enumerate(value)]
