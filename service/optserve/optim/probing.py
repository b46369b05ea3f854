"""What can be learned of an optimizer class by constructing it: bounds, groups, and its own words.

A class checks its hyperparameters in its constructor and nowhere else, in its own words. So the
constructor is asked: with the values just outside the usual intervals, one at a time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

_JUST_BELOW_ONE = 1.0 - 2.0**-24
#: Counts of work or memory that one request would take, which the classes do not check (well).
LIMITS: Mapping[str, tuple[int, int]] = {
    "history_size": (1, 10_000),
    "k": (1, 1_000),
    "lookahead_merge_time": (1, 2**53),
    "max_eval": (1, 100_000),
    "max_iter": (1, 10_000),
    "memory_length": (1, 2**53),
    "msign_steps": (1, 100),
    "ns_steps": (1, 99),
    "num_iterations": (1, 2**53),
    "num_warm_down_iterations": (0, 2**53),
    "num_warm_up_iterations": (0, 2**53),
    "power_iteration_steps": (1, 1_000),
    "solver_max_iterations": (1, 10_000),
    "warmup_steps": (0, 2**53),
}
#: Names that a class accepts, where it says so in prose only or not before its first step.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "adjust_lr_fn": ("original", "match_rms_adamw"),
    "line_search_fn": ("strong_wolfe",),
    "rebound": ("constant", "belief"),
    "weight_decay_type": ("l2", "decoupled", "stable"),
}

Accepts = Callable[[Any], bool]


def with_bounds(
    name: str, schema: dict[str, Any], default: Any, accepts: Accepts
) -> dict[str, Any]:
    """Return ``schema`` with the bounds that the class checks.

    ``accepts`` says whether the class can be constructed with a value of this hyperparameter.
    """
    if "prefixItems" in schema:
        items = []
        for i, item in enumerate(schema["prefixItems"]):

            def accepts_here(value: float, i: int = i) -> bool:
                return accepts((*default[:i], value, *default[i + 1 :]))

            items.append(with_bounds("", item, default[i], accepts_here))
        return {**schema, "prefixItems": items}
    if name in CHOICES and "string" in schema.get("type", ()):
        return {"enum": [*CHOICES[name], *[None] * ("null" in schema["type"])]}
    kinds = schema.get("type", ())
    if "number" in kinds:
        return {**schema, **_number_bounds(accepts)}
    if "integer" in kinds:
        return {**schema, **_integer_bounds(name, accepts)}
    return schema


def _number_bounds(accepts: Accepts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not accepts(-1.0):
        if accepts(0.0):
            found["minimum"] = 0
        elif accepts(2.0**-24):
            found["exclusiveMinimum"] = 0
        elif accepts(1.0):
            found["minimum"] = 1
        elif accepts(1.0 + 2.0**-20):
            found["exclusiveMinimum"] = 1
    if not accepts(2.0):
        if accepts(1.0):
            found["maximum"] = 1
        elif accepts(_JUST_BELOW_ONE):
            found["exclusiveMaximum"] = 1
        elif accepts(0.0):
            found["maximum"] = 0
    return found


def _integer_bounds(name: str, accepts: Accepts) -> dict[str, Any]:
    if name in LIMITS:
        return {"minimum": LIMITS[name][0], "maximum": LIMITS[name][1]}
    return {} if accepts(-1) else {"minimum": 0 if accepts(0) else 1}


def stand_in() -> torch.nn.Parameter:
    """Return a parameter, with its gradient, that every class takes."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.full((2, 2), 0.5)
    return parameter


def meaning(cls: type) -> str:
    """Return the first sentence of the class's docstring."""
    return _sentence(inspect.getdoc(cls) or "").removeprefix("Implements ")


def docs(cls: type) -> dict[str, str]:
    """Return the first sentence on each argument in the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _docs(inspect.cleandoc(base.__doc__ or ""))
    return found


def _docs(text: str) -> dict[str, str]:
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    body = inspect.cleandoc("\n" + section[1])
    rows = re.split(r"^(\w+) ?(?:\([^\n]*\))? ?: ?", body, flags=re.MULTILINE)
    return {name: _sentence(words) for name, words in zip(rows[1::2], rows[2::2], strict=True)}


def _sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    paragraph = re.sub(r"\s*\(default: (?:\([^)]*\)|[^()])*\)", "", paragraph)
    paragraph = re.sub(r"[`*]|\\\\?[()]", "", paragraph).removesuffix("_")
    first = re.split(r"(?<=[a-z0-9)])\. ", paragraph)[0].rstrip(".")
    return first[:1].upper() + first[1:]
