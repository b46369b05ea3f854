"""The fields of a request that are not tensors, and the sentences that refuse them."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from optserve.sentences import BOUNDS, inside, say, shown
from optserve_client import wire
from optserve_client.errors import Invalid, Malformed, OptserveError, TooLarge

#: Of the JSON string in a frame's metadata. Names of parameters whose gradient is None lie in it.
TEXT_LIMIT_BYTES = 2**20
MAX_METRICS = 100
#: What an SQL integer holds.
MAX_INT = 2**63 - 1

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
#: What pydantic puts into a location to say which member of a union it tried.
_UNION_TAG = re.compile(r"(?:constrained-)?(?:int|float|str)|bool|[A-Z]\w*|\w+\[.*\]")

#: What people write for a field, where its spelling is not close enough to tell.
_ALIASES = {
    "gradient": "grads",
    "gradients": "grads",
    "delta": "deltas",
    "grad": "grads",
    "parameters": "params",
    "parms": "params",
    "weights": "params",
    "learning_rate": "lr",
    "sched": "scheduler",
    "lr_scheduler": "scheduler",
    "max_grad_norm": "clip_grad_norm",
    "clip_norm": "clip_grad_norm",
    "grad_clip": "clip_grad_norm",
    "grad_scale": "loss_scale",
    "scale": "loss_scale",
}
#: Arguments of torch's optimizers that people put beside ``optimizer`` instead of inside.
_HYPERPARAMETERS = frozenset(
    [
        "lr",
        "learning_rate",
        "betas",
        "eps",
        "weight_decay",
        "momentum",
        "dampening",
        "nesterov",
        "amsgrad",
        "alpha",
        "centered",
        "rho",
        "lr_decay",
        "initial_accumulator_value",
        "momentum_decay",
        "decoupled_weight_decay",
        "lambd",
        "t0",
        "etas",
        "step_sizes",
        "max_iter",
        "max_eval",
        "tolerance_grad",
        "tolerance_change",
        "history_size",
        "line_search_fn",
        "ns_steps",
        "beta2_decay",
    ]
)


class Fields(BaseModel):
    """Base of all request models: no unknown keys, no coercion, no NaN or Infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        names = cls._names()
        if isinstance(data, Mapping) and not data.keys() <= names.keys():
            key, known = next(key for key in data if key not in names), list(names)
            # A step's tensors were taken out of the body before; they are fields, too.
            known += ["grads", "deltas", "params"] if "base_version" in known else []
            raise PydanticCustomError("unknown_field", "{text}", {"text": unknown(key, known)})
        return data

    @classmethod
    @cache
    def _names(cls) -> dict[str, None]:
        """Return the fields as a request spells them, in their order."""
        return {field.alias or name: None for name, field in cls.model_fields.items()}

    @classmethod
    def parse(cls, data: Any, where: str = "") -> Self:
        """Return the model of parsed JSON; raise Invalid with a sentence about the first fault."""
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise explain(exc, where) from exc


def _our_check(check: Any, *args: Any) -> AfterValidator:
    """Make one of wire's checks a pydantic validator; explain keeps its sentence."""

    def validate(value: Any) -> Any:
        try:
            check(*args, value)
        except OptserveError as exc:
            raise PydanticCustomError("ours", "{text}", {"text": exc.detail}) from exc
        return value

    return AfterValidator(validate)


def _check_reply_dtype(name: str) -> None:
    with contextlib.suppress(Invalid):
        if wire.dtype_tag(name) in {"F64", "F32", "F16", "BF16"}:
            return
    raise Invalid(f"return_dtype must be float64, float32, float16 or bfloat16, got {shown(name)}")


def _check_metric_name(name: str) -> None:
    if not 1 <= len(name) <= 256 or not name.isprintable():
        raise Invalid(f"a metric's name must be 1 to 256 printable characters, got {shown(name)}")


def _check_hyper(groups: list[dict[str, Any]]) -> None:
    for i, group in enumerate(groups):
        for name, value in group.items():
            parts = value if isinstance(value, list) else [value]
            if any(isinstance(part, list | dict) for part in parts):
                where = path_of(("groups", i, name))
                raise Invalid(f"{where} must be one value or a list of values, got {shown(value)}")


Worker = Annotated[str, _our_check(wire.check_id, "worker")]
MetricName = Annotated[str, _our_check(_check_metric_name)]
Metrics = Annotated[dict[MetricName, float], Field(max_length=MAX_METRICS)]


class StepFields(Fields):
    """Everything in a step but its tensors. A null is the same as leaving the field out."""

    #: Parameters whose gradient is None: the optimizer leaves them alone.
    none: list[str] = Field(default_factory=list)
    #: Assigned to ``param_groups[i]`` before the update, and stays.
    groups: Annotated[list[dict[str, Any]], _our_check(_check_hyper)] | None = None
    #: At the params at which the gradient was taken. Finite: a step without one is worth more than
    #: a history that JSON cannot show.
    loss: float | None = None
    metrics: Metrics = Field(default_factory=dict)
    worker: Worker | None = None
    epoch: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    seq: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    #: Version that the gradient was computed on.
    base_version: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    generation: Annotated[str, Field(max_length=128)] | None = None
    #: The gradient was multiplied by this; the server divides.
    loss_scale: Annotated[float, Field(gt=0)] | None = None
    #: Of this push in a weighted mean: its number of samples, say.
    weight: Annotated[float, Field(gt=0)] | None = None
    #: How long to wait for the end of the round, in seconds; 0: not at all.
    wait_s: Annotated[float, Field(ge=0, le=3600)] | None = None
    dry_run: bool = False
    return_: Annotated[Literal["params", "delta", "none"], Field(alias="return")] = "params"
    return_encoding: Literal["list", "base64"] | None = None
    return_dtype: Annotated[str, _our_check(_check_reply_dtype)] | None = None
    #: Elements that share a scale in ``int8/<name>/values``; 256 unless it is said.
    int8_block: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    #: Give up an open LBFGS line search.
    abandon: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and None in data.values():
            return {key: value for key, value in data.items() if value is not None}
        return data

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`parse` makes this of: only what was given."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def load_object(text: str, what: str, limit: int | None = TEXT_LIMIT_BYTES) -> dict[str, Any]:
    """Parse the JSON object in ``text``, a field of a frame; as strict as a JSON body is."""
    if limit is not None and len(text) > limit:
        raise TooLarge(f"{what} has {len(text)} characters, the limit is {limit}")

    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # only an escape can bring a lone surrogate, which no reply could carry
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        found = ord(exc.object[exc.start])
        raise Malformed(f"{what} holds the lone surrogate U+{found:04X}") from exc
    except RecursionError as exc:
        raise Malformed(f"{what} is nested too deeply") from exc
    except _Twice as exc:
        raise Malformed(f"{what} has the key {shown(exc.args[0])} twice in one object") from exc
    except ValueError as exc:
        raise Malformed(f"{what} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise Malformed(f"{what} must be a JSON object, got {shown(value)}")
    return value


class _Twice(Exception):
    """A key that stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return out


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int | float:
    """Return an integer of 64 bits, else the float next to it, as orjson does in a JSON body."""
    if len(digits) < 19:
        return int(digits)
    if math.isinf(nearest := float(digits)):
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return exact if -(2**63) <= (exact := int(digits)) < 2**64 else nearest


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer)


# --- sentences -----------------------------------------------------------------------------------


def explain(exc: ValidationError, where: str = "") -> Invalid:
    """Return Invalid with a sentence about the first fault: field, bound and value.

    ``where`` names the object that was validated, if it is not the whole body: ``optimizer``.
    """
    faults = exc.errors(include_url=False)
    fault, loc, bound = faults[0], faults[0]["loc"], ""
    for at, step in enumerate(loc):
        if isinstance(step, str) and _UNION_TAG.fullmatch(step):
            branches = [f for f in faults if f["loc"][:at] == loc[:at] and len(f["loc"]) > at]
            direct = {id(f["input"]) for f in branches if len(f["loc"]) == at + 1}
            # Members of a union saw the same value; entries of a dict that is keyed so did not.
            if len({f["loc"][at] for f in branches}) > 1 and len(direct) == 1:
                fault, bound = _closest(branches, at + 1)
                loc = (*fault["loc"][:at], *fault["loc"][at + 1 :])
                break
    path = path_of(loc, where)
    if fault["type"] == "extra_forbidden":
        sentence = inside(path_of(loc[:-1], where), unknown(loc[-1], ()))
    else:
        sentence = say(fault, path, bound)
    return Invalid(sentence, field=path) if path else Invalid(sentence)


def _closest(branches: list[ErrorDetails], depth: int) -> tuple[ErrorDetails, str]:
    """Return the fault of the union member whose type fits, else any and the bounds of all."""
    for fault in branches:
        if len(fault["loc"]) > depth or not fault["type"].endswith("_type"):
            return fault, ""
    return branches[0], " or ".join(dict.fromkeys(BOUNDS.get(f["type"], "") for f in branches))


def path_of(loc: Iterable[int | str], where: str = "") -> str:
    """Return a pydantic location as in Python: ``groups[0].lr``."""
    path = where
    for step in loc:
        if step == "[key]":
            continue
        if isinstance(step, str) and _PLAIN_KEY.fullmatch(step):
            path += f".{step}" if path else step
        else:
            path += f"[{shown(step)}]"
    return path


def unknown(name: object, known: Iterable[str], what: str = "field") -> str:
    """Return ``unknown field 'lrr' (did you mean 'lr'?)``."""
    # Comparing takes some 20 us per name: a session with 10,000 parameters gets fewer hints.
    names, text = list(islice(known, 1_000)), str(name)[:256]
    sentence = f"unknown {what} {shown(name)}"
    if what == "field" and "optimizer" in names:  # a create body
        if text in _HYPERPARAMETERS:
            spelled = f", as {_ALIASES[text]!r}" if text in _ALIASES else ""
            return f"{sentence}: hyperparameters go inside optimizer{spelled}"
        names.append("params")
    alias = _ALIASES.get(text.lower()) if what == "field" else None
    close = [alias] if alias in names else difflib.get_close_matches(text, names, n=1)
    hint = close[0] if close and close[0] != text else None
    return f"{sentence} (did you mean {hint!r}?)" if hint else sentence
