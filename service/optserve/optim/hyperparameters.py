"""One hyperparameter of an optimizer: its default, its JSON Schema, and the check of a value.

The schema that the catalogue publishes is the one that is enforced: :func:`check` reads the same
keywords. Types and defaults come from the constructor's signature.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optserve.optim.expressions import shown
from optserve_client.errors import Invalid

Schema = Mapping[str, Any]

#: Chosen by the session's ``impl``.
IMPL_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
DTYPES = ("float32", "float64", "bfloat16", "float16")
#: Integers beyond it are not exact in every JSON reader, and overflow inside torch.
INTEGER_LIMIT = 2**53
LENGTH_LIMIT = 100
#: What people write who think of another library, and what it may be called here.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "learningrate": ("lr",),
    "beta": ("betas",),
    "beta1": ("betas", "momentum"),
    "beta2": ("betas",),
    "epsilon": ("eps",),
    "wd": ("weight_decay",),
    "l2": ("weight_decay",),
    "decay": ("weight_decay",),
    "amsgrad": ("ams_bound",),
    "ams_bound": ("amsgrad",),
}
_NAMES = {
    "number": "a number",
    "integer": "an integer",
    "boolean": "true or false",
    "string": "a string",
    "null": "null",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyper:
    """One hyperparameter."""

    #: The constructor's own.
    default: Any
    schema: Schema
    #: One line.
    doc: str = ""
    required: bool = False

    def check(self, value: Any, where: str) -> Any:
        """Return ``value`` as the constructor takes it (dtypes by name), or raise Invalid."""
        return check(value, self.schema, where)

    @property
    def json_default(self) -> Any:
        """The default as strict JSON has it: dtypes by name, Infinity as a string."""
        return _json_value(self.default)


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Return the constructor's named arguments but params and the flags of the implementation."""
    return {
        name: parameter
        for name, parameter in inspect.signature(cls, eval_str=True).parameters.items()
        if name not in IMPL_FLAGS
        and name != "params"
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def schema_of(parameter: inspect.Parameter) -> dict[str, Any] | None:
    """Return the JSON Schema of an argument's type; None for what JSON cannot express."""
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    if isinstance(default, enum.IntEnum):
        return {"enum": [int(member) for member in type(default)]}
    members = _members(parameter.annotation)
    if isinstance(default, tuple):
        return _tuple_schema(members, len(default))
    return _scalar_schema(members)


def _scalar_schema(members: Sequence[Any]) -> dict[str, Any] | None:
    null = type(None) in members
    if literals := [m for m in members if typing.get_origin(m) is typing.Literal]:
        choices = [choice for m in literals for choice in typing.get_args(m)]
        return {"enum": choices + [None] * null}
    if torch.dtype in members:
        return {"enum": [*DTYPES, *[None] * null]}
    known = {bool: "boolean", int: "integer", float: "number", str: "string"}
    found = [known[m] for m in members if m in known] + ["null"] * null
    if found in ([], ["null"]):
        return None
    return {"type": found[0] if len(found) == 1 else found}


def _tuple_schema(members: Sequence[Any], length: int) -> dict[str, Any] | None:
    if tuple[int, ...] in members:
        return {"type": "array", "items": {"type": "integer"}, "maxItems": LENGTH_LIMIT}
    elements = next((a for m in members if len(a := typing.get_args(m)) == length), ())
    items = [_scalar_schema(_members(element)) for element in elements]
    if not items or None in items:
        return None
    return {"type": "array", "prefixItems": items, "minItems": length, "maxItems": length}


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return int(value) if isinstance(value, enum.IntEnum) else value


def check(value: Any, schema: Schema, where: str) -> Any:
    """Return ``value`` as the constructor takes it (dtypes by name), or raise Invalid."""
    if isinstance(value, torch.dtype):
        value = _json_value(value)
    if "enum" in schema:
        if not any(type(value) is type(c) and value == c for c in schema["enum"]):
            choices = ", ".join(shown(choice) for choice in schema["enum"])
            raise _refusal(where, f"must be one of {choices}", value)
        return value
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if "array" in kinds:
        return _checked_list(value, schema, where)
    if (
        (value is None and "null" in kinds)
        or (isinstance(value, bool) and "boolean" in kinds)
        or (isinstance(value, str) and "string" in kinds and len(value) <= LENGTH_LIMIT)
    ):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "integer" in kinds and (isinstance(value, int) or value.is_integer()):
            return _bounded(_exact(int(value), where), schema, where)
        if "number" in kinds:
            return _bounded(_finite(value, where), schema, where)
    raise _refusal(where, f"must be {' or '.join(_NAMES[kind] for kind in kinds)}", value)


def _refusal(where: str, rule: str, value: Any) -> Invalid:
    return Invalid(f"{where} {rule}, got {shown(value)}", field=where)


def _exact(value: int, where: str) -> int:
    if abs(value) > INTEGER_LIMIT:
        raise _refusal(where, f"must be at most {INTEGER_LIMIT}", value)
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _refusal(where, "must be a finite number", value)
    return number


def _checked_list(value: Any, schema: Schema, where: str) -> tuple[Any, ...]:
    length = len(value) if isinstance(value, list | tuple) else -1
    least, most = schema.get("minItems", 0), schema["maxItems"]
    if not least <= length <= most:
        count = f"{most}" if least == most else f"at most {most}"
        raise _refusal(where, f"must be a list of {count} values", value)
    items = schema.get("prefixItems") or [schema["items"]] * length
    pairs = zip(value, items, strict=True)
    return tuple(check(item, one, f"{where}[{i}]") for i, (item, one) in enumerate(pairs))


def _bounded(value: Any, schema: Schema, where: str) -> Any:
    if (
        value < schema.get("minimum", -math.inf)
        or value <= schema.get("exclusiveMinimum", -math.inf)
        or value > schema.get("maximum", math.inf)
        or value >= schema.get("exclusiveMaximum", math.inf)
    ):
        raise _refusal(where, f"must be {interval(schema)}", value)
    return value


def interval(schema: Schema) -> str:
    """Return the bounds of a schema in words: ``>= 0``, ``in [0, 1)``."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None and high is not None:
        left, right = "[" if "minimum" in schema else "(", "]" if "maximum" in schema else ")"
        return f"in {left}{low:g}, {high:g}{right}"
    if low is not None:
        return f"{'>=' if 'minimum' in schema else '>'} {low:g}"
    return f"{'<=' if 'maximum' in schema else '<'} {high:g}"


def unknown(key: str, known: Iterable[str], name: str, where: str) -> Invalid:
    """Return the refusal of a key that ``name`` does not have, with the closest spelling."""
    field, names = f"{where}.{key[:LENGTH_LIMIT]}", list(known)
    if key in IMPL_FLAGS:
        return Invalid(
            f"{field} is not set here: impl of the session chooses the implementation "
            "(auto, fused, foreach or single)",
            field=field,
        )
    close = [n for n in _SYNONYMS.get(key.lower(), ()) if n in names]
    close = close or difflib.get_close_matches(key[:LENGTH_LIMIT].lower(), names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names) or 'none'}"
    said = f"{where}: {key[:LENGTH_LIMIT]!r} is not a hyperparameter of {name}: {hint}"
    return Invalid(said, field=field)
