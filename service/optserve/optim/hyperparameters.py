"""Hyperparameters of an optimizer class: read off its signature, checked before torch sees them."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optserve_client.errors import Invalid

#: Arguments that choose an implementation: the session's ``impl`` does.
FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
#: Arguments that JSON cannot say, or that have no meaning for a session.
_SKIPPED = FLAGS | {"self", "params", "model", "compile_kwargs", "kwargs", "args"}

#: Name -> (least, most, most is excluded). Of each element where the value is a tuple.
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "lr": (0.0, math.inf, False),
    "betas": (0.0, 1.0, True),
    "beta1": (0.0, 1.0, True),
    "beta2": (0.0, 1.0, True),
    "eps": (0.0, math.inf, False),
    "weight_decay": (0.0, math.inf, False),
    "momentum": (0.0, math.inf, False),
    "alpha": (0.0, math.inf, False),
    "rho": (0.0, 1.0, False),
    "lr_decay": (0.0, math.inf, False),
    "initial_accumulator_value": (0.0, math.inf, False),
    "momentum_decay": (0.0, math.inf, False),
    "switch_tol": (0.0, math.inf, False),
    "ns_steps": (1, 99, False),
    "max_iter": (1, 10_000, False),
    "max_eval": (1, 100_000, False),
    "history_size": (1, 10_000, False),
    "tolerance_grad": (0.0, math.inf, False),
    "tolerance_change": (0.0, math.inf, False),
    "k": (1, 1_000, False),
    "num_iterations": (1, 2**53, False),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "line_search_fn": ("strong_wolfe",),
    "adjust_lr_fn": ("original", "match_rms_adamw"),
    "pullback_momentum": ("none", "reset", "pullback"),
}
_MAX_TEXT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyper:
    """One hyperparameter."""

    #: ``number``, ``integer``, ``boolean``, ``string``, or ``numbers`` for a tuple.
    kind: str
    default: Any
    required: bool = False
    nullable: bool = False
    #: Elements of a tuple.
    length: int = 0
    #: Element by element: None is allowed (Adafactor's eps).
    nullable_elements: bool = False
    least: float = -math.inf
    most: float = math.inf
    open_end: bool = False
    choices: tuple[str, ...] = ()

    def bound(self) -> str:
        """Return the bound for a sentence: ``in [0, 1)``."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "string":
            return "a string"
        what = "an integer" if self.kind == "integer" else "a number"
        if math.isfinite(self.most):
            return f"{what} in [{self.least:g}, {self.most:g}{')' if self.open_end else ']'}"
        return f"{what} >= {self.least:g}" if math.isfinite(self.least) else what

    def check(self, value: Any, where: str) -> Any:
        """Return ``value`` as torch wants it, or raise Invalid that names value and bound."""
        if value is None and self.nullable:
            return None
        if self.kind != "numbers":
            return self._check_one(value, where)
        if not isinstance(value, (list, tuple)) or len(value) != self.length:
            raise Invalid(
                f"{where} must be a list of {self.length} numbers, got {value!r:.80}", field=where
            )
        return tuple(
            None
            if item is None and self.nullable_elements
            else self._check_one(item, f"{where}[{i}]")
            for i, item in enumerate(value)
        )

    def _check_one(self, value: Any, where: str) -> Any:
        if not self._admits(value):
            raise Invalid(f"{where} must be {self.bound()}, got {value!r:.80}", field=where)
        # A float also where JSON has 1: Python would compute a power of two ints digit by digit.
        return float(value) if self.kind in ("number", "numbers") else value

    def _admits(self, value: Any) -> bool:
        if self.kind == "boolean":
            return isinstance(value, bool)
        if self.kind == "string":
            fits = isinstance(value, str) and len(value) <= _MAX_TEXT
            return fits and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if self.kind == "integer" and not isinstance(value, int):
            return False
        if not -1e308 <= value <= 1e308:
            return False
        return (
            self.least <= value < self.most if self.open_end else self.least <= value <= self.most
        )

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of this hyperparameter."""
        if self.kind == "numbers":
            item = self._one_schema()
            if self.nullable_elements:
                item = {"anyOf": [item, {"type": "null"}]}
            made = {
                "type": "array",
                "items": item,
                "minItems": self.length,
                "maxItems": self.length,
            }
        else:
            made = self._one_schema()
        if self.nullable:
            made = {"anyOf": [made, {"type": "null"}]}
        if not self.required:
            made["default"] = self.json_default
        return made

    @property
    def json_default(self) -> Any:
        """The default as strict JSON has it."""
        if isinstance(self.default, tuple):
            return list(self.default)
        return "Infinity" if self.default == math.inf else self.default

    def _one_schema(self) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "number" if self.kind == "numbers" else self.kind}
        if math.isfinite(self.least):
            made["minimum"] = self.least
        if math.isfinite(self.most):
            made["exclusiveMaximum" if self.open_end else "maximum"] = self.most
        if self.choices:
            made["enum"] = list(self.choices)
        return made


def derive(cls: type, defaults: Mapping[str, Any] | None = None) -> dict[str, Hyper]:
    """Read the hyperparameters off a class's signature; ``defaults`` replaces some of its own."""
    found: dict[str, Hyper] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in _SKIPPED or parameter.kind in (
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        ):
            continue
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        if defaults and name in defaults:
            default = defaults[name]
        if callable(default):
            continue
        hyper = _hyper(name, str(parameter.annotation), default, required)
        if hyper is not None:
            found[name] = hyper
    return found


def _hyper(name: str, annotation: str, default: Any, required: bool) -> Hyper | None:
    least, most, open_end = _BOUNDS.get(name, (-math.inf, math.inf, False))
    common: dict[str, Any] = {
        "default": default,
        "required": required,
        "nullable": (default is None and not required) or "None" in annotation.split("[")[0],
        "least": least,
        "most": most,
        "open_end": open_end,
    }
    if isinstance(default, (tuple, list)) or "tuple" in annotation.lower() or "Betas" in annotation:
        if default is None:
            return None
        return Hyper(
            kind="numbers",
            length=len(default),
            nullable_elements=any(item is None for item in default),
            **{**common, "default": tuple(default), "nullable": False},
        )
    if isinstance(default, bool) or annotation.startswith(("bool", "<class 'bool'")):
        return Hyper(kind="boolean", **{**common, "least": -math.inf, "most": math.inf})
    if isinstance(default, str) or "str" in annotation or "Literal" in annotation:
        plain = {**common, "least": -math.inf, "most": math.inf}
        return Hyper(kind="string", choices=_CHOICES.get(name, ()), **plain)
    if "float" in annotation or isinstance(default, float):
        return Hyper(kind="number", **common)
    if "int" in annotation or isinstance(default, int):
        return Hyper(kind="integer", **common)
    return None


def check_all(given: Mapping[str, Any], known: Mapping[str, Hyper], where: str) -> dict[str, Any]:
    """Return ``given`` normalised; raise Invalid for unknown names and wrong values."""
    checked = {}
    for name, value in given.items():
        if name in FLAGS:
            raise Invalid(
                f"{where}.{name} is not a hyperparameter: choose the implementation with impl",
                field=f"{where}.{name}",
            )
        if name not in known:
            raise Invalid(unknown(name, known, where), field=f"{where}.{name:.80}")
        checked[name] = known[name].check(value, f"{where}.{name}")
    return checked


def unknown(name: str, known: Mapping[str, Any], where: str) -> str:
    """Return the sentence for an unknown name, with the closest known one."""
    close = difflib.get_close_matches(name[:256], known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{where}: unknown hyperparameter {name[:80]!r}{hint}"
