"""The two forms of a tensor inside JSON: nested lists, and base64 with dtype and shape.

Import these from :mod:`optserve_client.wire`.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from optserve_client._tensors import (
    MAX_RANK,
    Array,
    Bits,
    Tensor,
    as_bytes,
    dtype_name,
    dtype_of,
    dtype_tag,
    from_bytes,
    numpy_dtype,
)
from optserve_client.errors import Invalid, Malformed

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})


def tensor_from_json(
    value: Any, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Read a tensor from parsed JSON, in which a float64 array may stand for nested lists.

    A number or nested lists become ``dtype`` (a wire tag; float32 by default), where ``"NaN"``,
    ``"Infinity"`` and ``"-Infinity"`` stand for themselves. ``{"dtype", "shape", "data"}`` with
    little-endian base64 keeps its own dtype. ``shape``, if given, must be met; empty lists
    meet every shape that they could be. ``name`` is what messages call the tensor: ``grads['w']``.
    """
    if isinstance(value, dict):
        tensor = _from_base64(value, name)
    else:
        flat, dims = _flatten(value, name)
        # Lists cannot say what comes after an empty dimension: [[]] may be [1, 0] or [1, 0, 3].
        if shape is not None and 0 in shape and dims[-1:] == (0,):
            dims = tuple(shape) if len(dims) == 1 or dims == shape[: len(dims)] else dims
        tensor = _from_numbers(flat, dims, name, dtype or "F32")
    if shape is not None and tensor.shape != tuple(shape):
        raise Invalid(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def tensor_to_json(t: Tensor, encoding: Literal["list", "base64"] = "list") -> Any:
    """Return ``t`` as nested lists, exact in decimal, or as a base64 object."""
    if encoding == "base64":
        data = base64.b64encode(as_bytes(t)).decode("ascii")
        return {"dtype": dtype_name(dtype_of(t)), "shape": list(t.shape), "data": data}
    array = t.to_float32() if isinstance(t, Bits) else t
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return _spell(array.tolist())
    return array.tolist()


def _spell(value: Any) -> Any:
    if isinstance(value, list):
        return [_spell(v) for v in value]
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_base64(value: dict[str, Any], name: str) -> Tensor:
    if value.keys() != {"dtype", "shape", "data"}:
        have = sorted(map(str, value))[:8]
        raise Invalid(f"{name} must have exactly the keys dtype, shape and data, got {have}")
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if not isinstance(dtype, str):
        raise Invalid(f"{name}.dtype must be a string, got {_json_word(dtype)}")
    try:
        tag = dtype_tag(dtype)
    except Invalid as exc:
        raise Invalid(f"{name}.{exc.detail}") from exc
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or not all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        raise Invalid(
            f"{name}.shape must be a list of at most {MAX_RANK} integers >= 0, got {shape!r:.80}"
        )
    if not isinstance(data, str):
        raise Invalid(f"{name}.data must be a base64 string, got {_json_word(data)}")
    try:
        raw = base64.b64decode(data.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as exc:
        raise Invalid(f"{name}.data is not base64: {exc}") from exc
    try:
        return from_bytes(tag, shape, raw)
    except Malformed as exc:
        raise Invalid(f"{name}: {exc.detail}") from exc


def _flatten(value: Any, name: str) -> tuple[list[Any] | Array, tuple[int, ...]]:
    """Return the numbers of nested lists and their shape; whole levels at C speed."""
    if isinstance(value, np.ndarray):
        return value.reshape(-1), value.shape
    flat: list[Any] = [value]
    dims: list[int] = []
    # A list among numbers is found when they are converted.
    while flat and type(flat[0]) is list:
        lengths = set(map(len, flat)) if set(map(type, flat)) == {list} else set()
        if len(lengths) != 1:
            raise _ragged(name, len(dims))
        if len(dims) == MAX_RANK:
            raise Invalid(f"{name} has more than {MAX_RANK} dimensions")
        dims.append(lengths.pop())
        flat = flat[0] if len(flat) == 1 else list(chain.from_iterable(flat))
    return flat, tuple(dims)


def _ragged(name: str, depth: int) -> Invalid:
    return Invalid(f"{name} is ragged: at depth {depth} not all are lists of one length")


def _from_numbers(flat: list[Any] | Array, dims: Sequence[int], name: str, dtype: str) -> Tensor:
    if dtype in _INTEGERS:
        return _integers(flat, dims, name, dtype)
    if dtype not in {"F64", "F32", "F16", "BF16"}:
        raise Invalid(f"{name}: {dtype_name(dtype)} cannot be given as lists, only as base64")
    wide = flat if isinstance(flat, np.ndarray) else _float64(flat, dims, name)
    if dtype == "F64":
        return wide.reshape(dims)
    with np.errstate(over="ignore"):
        out = wide.astype(numpy_dtype("F16" if dtype == "F16" else "F32"))
    tensor: Tensor = Bits.bfloat16(out) if dtype == "BF16" else out
    rounded = tensor.to_float32() if isinstance(tensor, Bits) else tensor
    if (over := np.isinf(rounded) & np.isfinite(wide)).any():
        at = int(np.argmax(over))
        raise Invalid(
            f"{name}{_index(at, dims)} is {float(wide[at])!r}, too large for {dtype_name(dtype)}"
        )
    if isinstance(tensor, Bits):
        return Bits(tensor.array.reshape(dims), "BF16")
    return tensor.reshape(dims)


def _float64(flat: list[Any], dims: Sequence[int], name: str) -> Array:
    wide = np.empty(len(flat))
    try:
        # Takes numbers only, and in a third of numpy's time.
        struct.pack_into(f"{len(flat)}d", wide.data, 0, *flat)
    except struct.error:
        return _float64(_despelled(flat, dims, name), dims, name)
    # But also true and false, as 1 and 0.
    maybe = np.flatnonzero((wide == 0) | (wide == 1)).tolist()
    if bool in set(map(type, map(flat.__getitem__, maybe))):
        at = next(at for at in maybe if type(flat[at]) is bool)
        _number(flat[at], at, dims, name)
    return wide


def _despelled(flat: list[Any], dims: Sequence[int], name: str) -> list[Any]:
    """Return ``flat`` with numbers where they were spelled; refuse what else is no float64."""
    try:
        array("d", flat)  # says what struct does not: which of two faults comes first
    except OverflowError as exc:
        raise Invalid(f"{name} holds an integer too large for float64") from exc
    except TypeError:
        _check_depth(flat, dims, name)
    return [_number(v, i, dims, name) for i, v in enumerate(flat)]


def _check_depth(flat: list[Any] | Array, dims: Sequence[int], name: str) -> None:
    if list in set(map(type, flat)):
        raise _ragged(name, len(dims))


def _integers(flat: list[Any] | Array, dims: Sequence[int], name: str, dtype: str) -> Array:
    types = set(map(type, flat))
    _check_depth(flat, dims, name)
    if not types <= {int}:
        at = next(i for i, v in enumerate(flat) if type(v) is not int)
        raise Invalid(f"{name}{_index(at, dims)} must be an integer, got {_json_word(flat[at])}")
    try:
        return np.array(flat, numpy_dtype(dtype)).reshape(dims)
    except OverflowError as exc:
        raise Invalid(f"{name} holds an integer outside {dtype_name(dtype)}") from exc


def _number(value: Any, at: int, dims: Sequence[int], name: str) -> Any:
    if type(value) in (int, float):
        return value
    if isinstance(value, str) and value in _NONFINITE:
        return _NONFINITE[value]
    raise Invalid(f"{name}{_index(at, dims)} must be a number, got {_json_word(value)}")


def _index(at: int, dims: Sequence[int]) -> str:
    where = [int(i) for i in np.unravel_index(at, tuple(dims))] if dims else []
    return str(where) if where else ""


def _json_word(value: Any) -> str:
    """Return a short JSON-like word for a value in a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return repr(value[:60]) if isinstance(value, str) else repr(value)
