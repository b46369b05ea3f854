"""What is wrong with a value, in words; loads no more than pydantic."""

from __future__ import annotations

import reprlib

from pydantic_core import ErrorDetails

_SHOWN = 80
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _SHOWN


def shown(value: object) -> str:
    """Return ``value`` for a sentence, in JSON's words, at most 80 characters of it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # its decimal digits may be refused
    text = repr(value[:_SHOWN]) if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


#: What a value must be, by pydantic's kind of fault.
BOUNDS = {
    "finite_number": "a finite number",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of 64 bits",
    "int_from_float": "an integer",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "literal_error": "{expected}",
}

_LIMITS = {"gt", "ge", "lt", "le"}


def say(fault: ErrorDetails, path: str, bound: str = "") -> str:
    """Return the sentence about one fault of the value at ``path``; ``bound`` replaces its own."""
    kind, context, value = fault["type"], fault.get("ctx", {}), fault["input"]
    thing = path or "the body"
    if kind == "unknown_field":
        return inside(path, fault["msg"])
    if kind == "ours":
        return fault["msg"]
    if kind == "missing":
        return f"{thing} is missing"
    if kind == "value_error":  # of a validator of our own
        return f"{thing} {context['error']}"
    if bound := bound or BOUNDS.get(kind, ""):
        limits = {k: int(v) if v == v // 1 else v for k, v in context.items() if k in _LIMITS}
        return f"{thing} must be {bound.format(**{**context, **limits})}, got {shown(value)}"
    if kind in {"too_long", "too_short", "string_too_long", "string_too_short"}:
        most, unit = ("most", "max") if kind.endswith("long") else ("least", "min")
        what = "characters" if kind.startswith("string") else "entries"
        return f"{thing} must have at {most} {context[f'{unit}_length']} {what}, got {len(value)}"
    return f"{thing}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {shown(value)}"


def inside(path: str, sentence: str) -> str:
    """Return ``sentence`` with the place that it is about, where there is one."""
    return f"{path}: {sentence}" if path else sentence
