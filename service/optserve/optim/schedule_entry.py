"""What an entry of the schedulers' catalogue is: a torch class, its arguments and a schema."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch.optim import lr_scheduler

from optserve.optim.expressions import FUNCTIONS, LENGTH_LIMIT, TABLE_LIMIT

Kind = Literal["number", "integer", "boolean", "enum", "function", "milestones", "schedulers"]

#: Largest integer that every JSON reader keeps exactly.
INTEGER_LIMIT = 2**53 - 1
MILESTONES_LIMIT = 10_000
SCHEDULERS_LIMIT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One argument of a scheduler."""

    kind: Kind
    doc: str
    #: The interval, ``least`` and ``most`` included, ``above`` and ``below`` not.
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    #: A list, one value per parameter group, is taken too.
    per_group: bool = False
    #: Values of an enum.
    choices: tuple[str, ...] = ()
    #: The name of the number that a function takes: ``epoch`` or ``x``.
    variable: str = ""

    @property
    def bound(self) -> str:
        """Return the interval in words, as in ``factor must be <bound>``."""
        left = f"({self.above:g}" if self.above > -math.inf else f"[{self.least:g}"
        right = f"{self.below:g})" if self.below < math.inf else f"{self.most:g}]"
        if right == "inf]":
            return f"> {self.above:g}" if left[0] == "(" else f">= {self.least:g}"
        return f"in {left}, {right}"

    def admits(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of one value, or of a value and a list of them."""
        one = self._one()
        if self.per_group:
            return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        return one

    def _one(self) -> dict[str, Any]:
        match self.kind:
            case "number":
                names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
                bounds = (self.least, self.most, self.above, self.below)
                finite = {n: b for n, b in zip(names, bounds, strict=True) if math.isfinite(b)}
                return {"type": "number"} | finite
            case "integer":
                return {"type": "integer", "minimum": int(self.least), "maximum": int(self.most)}
            case "boolean":
                return {"type": "boolean"}
            case "enum":
                return {"enum": list(self.choices)}
            case "function":
                return _function_schema(self.variable)
            case "milestones":
                items = {"type": "integer", "minimum": 1, "maximum": INTEGER_LIMIT}
                return {"type": "array", "items": items, "maxItems": MILESTONES_LIMIT}
            case "schedulers":
                items = {"type": ["object", "array"], "description": "A scheduler like this one."}
                return {"type": "array", "items": items, "maxItems": SCHEDULERS_LIMIT}


def _function_schema(variable: str) -> dict[str, Any]:
    numbers = {"type": "array", "items": {"type": "number"}}
    table = numbers | {"minItems": 1, "maxItems": TABLE_LIMIT}
    return {
        "anyOf": [
            {
                "type": "string",
                "minLength": 1,
                "maxLength": LENGTH_LIMIT,
                "description": f"An expression in {variable}, pi, e and tau, of numbers, + - * / "
                f"// % **, comparisons, and, or, not, a if b else c, and {', '.join(FUNCTIONS)}.",
            },
            {
                "type": "object",
                "properties": {"table": table},
                "required": ["table"],
                "additionalProperties": False,
                "description": f"The value at {variable} = 0, 1, ...; the last one holds.",
            },
        ]
    }


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One scheduler class."""

    made_by: type[lr_scheduler.LRScheduler]
    #: One line.
    meaning: str
    fields: Mapping[str, Field]
    #: A complete specification.
    example: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.made_by.__name__

    @property
    def source(self) -> str:
        return f"torch.optim.lr_scheduler.{self.name}"

    @property
    def needs_metrics(self) -> bool:
        return self.made_by is lr_scheduler.ReduceLROnPlateau

    @property
    def composite(self) -> bool:
        """Whether it is made of other schedulers."""
        return "schedulers" in self.fields

    @property
    def cycles_momentum(self) -> bool:
        return "cycle_momentum" in self.fields

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Return torch's default of each field that has one."""
        parameters = inspect.signature(self.made_by).parameters
        given = {name: parameters[name].default for name in self.fields}
        return {name: d for name, d in given.items() if d is not inspect.Parameter.empty}

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of a specification of this scheduler."""
        properties: dict[str, Any] = {
            "name": {"const": self.name, "description": "Lower case and snake_case are taken too."}
        }
        for name, field in self.fields.items():
            schema = field.schema() | {"description": field.doc}
            if name in self.defaults:
                default = self.defaults[name]
                schema = {"anyOf": [schema, {"type": "null"}]} if default is None else schema
                schema["default"] = default
            properties[name] = schema
        properties["advance"] = {
            "enum": ["manual", "step"],
            "default": "manual",
            "description": "Outermost scheduler only: step on request, or after each update.",
        }
        if self.needs_metrics:
            properties["monitor"] = {
                "type": "string",
                "default": "loss",
                "description": "With advance: step, what to follow: loss, or a name in metrics.",
            }
        required = ["name", *(n for n in self.fields if n not in self.defaults)]
        return {
            "type": "object",
            "description": self.meaning,
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
