"""What the methods of both clients are given, as fields, tensors and headers of a request."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve_client import errors, wire
from optserve_client._values import Json, Params

#: The longest that the server lets a request wait.
_LONGEST_WAIT_S = 3600.0


def array(value: Any, what: str, dtype: str | None = None) -> wire.Tensor:
    """Return ``value`` as a tensor, which messages call ``what``.

    An array keeps its dtype. Numbers and lists have none: they become ``dtype``, which is float32
    if it is not known, as in JSON.
    """
    if isinstance(value, wire.Bits):
        return value
    if not isinstance(value, (list, tuple, int, float)) or isinstance(value, (bool, np.generic)):
        return np.asarray(value)
    try:
        numbers = np.asarray(value, np.float64).tolist()
    except (TypeError, ValueError) as exc:
        raise errors.Invalid(f"{what} must be numbers in lists of equal lengths: {exc}") from exc
    return wire.tensor_from_json(numbers, what, wire.dtype_tag(dtype or "float32"))


def in_session(tensor: wire.Tensor, what: str, dtype: str | None) -> wire.Tensor:
    """Return ``tensor`` in the session's dtype, if that is known; refuse what would be rounded."""
    return tensor if dtype is None else wire.widen(tensor, wire.dtype_tag(dtype), what)


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Return ``value`` if it maps names to something, else say that it should."""
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise TypeError(f'{what} must map names to arrays, such as {{"w": array}}, got {kind}')
    return value


def dtype_of(info: Mapping[str, Any]) -> str | None:
    """Return the dtype of a session from what the server said of it, if it did."""
    dtype = info.get("dtype")
    return dtype if isinstance(dtype, str) else None


def given(**fields: Any) -> Json:
    """Return the fields that are not None; a trailing underscore is dropped."""
    return {key.rstrip("_"): value for key, value in fields.items() if value is not None}


def step_fields(returns: str, flags: Mapping[str, bool], **fields: Any) -> Json:
    """Return the fields of a step. A loss or metric that is not finite is left out."""
    if not _finite(fields["loss"]):
        fields["loss"] = None
    if fields["metrics"] is not None:
        fields["metrics"] = finite_metrics(fields["metrics"]) or None
    set_flags = {name: True for name, flag in flags.items() if flag}
    return given(**fields, return_=None if returns == "params" else returns) | set_flags


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if _finite(value)}


def _finite(value: Any) -> bool:
    """Return False for a NaN or Infinity; what is no number is for the server to refuse."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return True


def param_tensors(
    params: Mapping[str, Any], dtype: str | None = None, what: str = "params"
) -> dict[str, wire.Tensor]:
    named = mapping(params, what)
    return {f"param/{name}": array(v, f"{what}[{name!r}]", dtype) for name, v in named.items()}


def condition(if_match: Params | str | None) -> dict[str, str]:
    """Return the header that lets a change through only if ``if_match`` is still current."""
    etag = if_match.etag if isinstance(if_match, Params) else if_match
    if etag is not None and not (etag.isascii() and etag.isprintable()):
        # Found before the change has a number, which would be taken for used up.
        raise errors.Invalid(f"if_match holds what is not printable ASCII: {etag!r:.80}")
    return {} if etag is None else {"If-Match": etag}


def patience_s(timeout_s: float) -> float:
    """Return how long a push may wait for the others of its round before it is sent again.

    Less than the time after which many a proxy gives up a silent connection, if the client does.
    """
    return min(max(timeout_s - 5.0, 1.0), _LONGEST_WAIT_S)


def seconds(value: Any, what: str) -> float:
    """Return ``value`` as how long the server may let a request wait."""
    try:
        return max(float(value), 0.0)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number of seconds, got {value!r:.80}") from None


def integer(value: Any, what: str) -> int:
    """Return ``value`` if it is one, for a part of a path."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {value!r:.80}") from None
