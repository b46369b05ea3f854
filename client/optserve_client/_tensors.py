"""Tensors without torch: dtype tags, bfloat16 as bits, names, exact and rounding conversions.

Import these from :mod:`optserve_client.wire`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np

from optserve_client.errors import Invalid, Malformed

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
BytesLike: TypeAlias = bytes | bytearray | memoryview

#: safetensors' tag -> the little-endian numpy dtype that stores it, and the name in JSON (torch's).
_STORAGE: dict[str, tuple[np.dtype[Any], str]] = {
    "F64": (np.dtype("<f8"), "float64"),
    "F32": (np.dtype("<f4"), "float32"),
    "F16": (np.dtype("<f2"), "float16"),
    "BF16": (np.dtype("<u2"), "bfloat16"),
    "I64": (np.dtype("<i8"), "int64"),
    "I32": (np.dtype("<i4"), "int32"),
    "I16": (np.dtype("<i2"), "int16"),
    "I8": (np.dtype("i1"), "int8"),
    "U64": (np.dtype("<u8"), "uint64"),
    "U32": (np.dtype("<u4"), "uint32"),
    "U16": (np.dtype("<u2"), "uint16"),
    "U8": (np.dtype("u1"), "uint8"),
    "BOOL": (np.dtype("?"), "bool"),
    "F8_E4M3": (np.dtype("u1"), "float8_e4m3fn"),
    "F8_E5M2": (np.dtype("u1"), "float8_e5m2"),
}
_AS_BITS = frozenset({"BF16", "F8_E4M3", "F8_E5M2"})
_TAG_OF_NUMPY = {dtype: tag for tag, (dtype, _) in _STORAGE.items() if tag not in _AS_BITS}
_TAG_OF_NAME = {name: tag for tag, (_, name) in _STORAGE.items()}

MAX_RANK = 32
#: Larger sizes do not fit numpy's index type.
_MAX_BYTES = 2**63 - 1

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """A tensor of a dtype that numpy does not have, as its raw bits."""

    #: uint16 for BF16, uint8 for the F8 kinds; any shape.
    array: Array
    #: ``BF16``, ``F8_E4M3`` or ``F8_E5M2``.
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _AS_BITS:
            raise Invalid(f"Bits.dtype must be one of {sorted(_AS_BITS)}, got {self.dtype!r}")
        if self.array.dtype.newbyteorder("<") != _STORAGE[self.dtype][0]:
            want = _STORAGE[self.dtype][0].name
            raise Invalid(f"Bits of {self.dtype} must hold {want}, got {self.array.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.array.shape
        return shape

    def to_float32(self) -> Array:
        """Return the values as float32, which is exact. Only for BF16."""
        if self.dtype != "BF16":
            raise Invalid(f"only BF16 converts to float32, not {self.dtype}")
        flat = np.ascontiguousarray(self.array).reshape(-1).astype(np.uint32)
        return (flat << np.uint32(16)).view(np.float32).reshape(self.shape)

    @classmethod
    def bfloat16(cls, a: Array) -> Bits:
        """Round ``a`` to bfloat16, to nearest even; NaN stays NaN.

        float64 goes through float32 first, as in torch's ``Tensor.to(torch.bfloat16)``.
        """
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(a, dtype=np.float32).reshape(-1)
        bits = values.view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + (even + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
        nan = np.isnan(values)
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
        return cls(rounded.reshape(np.shape(a)), "BF16")


Tensor: TypeAlias = Array | Bits


def numpy_dtype(tag: str) -> np.dtype[Any]:
    """Return the little-endian numpy dtype that stores ``tag`` (uint16 for BF16)."""
    return _STORAGE[tag][0] if tag in _STORAGE else _unknown(tag)


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of the wire dtype ``dtype``."""
    return numpy_dtype(dtype).itemsize


def dtype_tag(name: str) -> str:
    """Return the wire tag of a dtype's name: ``"float32"``, ``"torch.float32"`` or ``"F32"``."""
    tag = _TAG_OF_NAME.get(name.removeprefix("torch."), name)
    return tag if tag in _STORAGE else _unknown(name)


def dtype_name(tag: str) -> str:
    """Return torch's name of a wire tag: ``"float32"`` for ``"F32"``."""
    return _STORAGE[tag][1] if tag in _STORAGE else _unknown(tag)


def dtype_of(t: Tensor) -> str:
    """Return the wire tag of a tensor, whatever its byte order."""
    if isinstance(t, Bits):
        return t.dtype
    tag = _TAG_OF_NUMPY.get(t.dtype.newbyteorder("<"))
    return tag if tag is not None else _unknown(str(t.dtype))


def _unknown(name: str) -> NoReturn:
    raise Invalid(f"dtype must be one of {', '.join(_TAG_OF_NAME)}, got {_short(name)}")


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a dense tensor; refuse what numpy could not index."""
    size = itemsize(dtype)
    # Zeros are left out: numpy refuses [0, 2**62, 2**62] too.
    if math.prod(n for n in shape if n) * size > _MAX_BYTES:
        raise Malformed(f"shape {list(shape)} of {dtype} has more than {_MAX_BYTES} bytes")
    return math.prod(shape) * size


def as_bytes(t: Tensor) -> memoryview:
    """Return the little-endian bytes of ``t``; no copy if it is C-contiguous and little-endian."""
    array = t.array if isinstance(t, Bits) else t
    flat = np.ascontiguousarray(array, dtype=numpy_dtype(dtype_of(t))).reshape(-1)
    return flat.view(np.uint8).data


def from_bytes(dtype: str, shape: Sequence[int], buffer: BytesLike) -> Tensor:
    """Return a view of ``buffer`` as a tensor; read-only if the buffer is."""
    have, want = memoryview(buffer).nbytes, nbytes(dtype, shape)
    if have != want:
        raise Malformed(f"{have} bytes do not match shape {list(shape)} of {dtype} ({want} bytes)")
    storage = numpy_dtype(dtype)
    if not want:
        array: Array = np.empty(tuple(shape), storage)
    else:
        array = np.frombuffer(buffer, storage).reshape(tuple(shape))
    if dtype == "BOOL" and want and int(np.max(array.view(np.uint8))) > 1:
        raise Malformed("a BOOL tensor holds bytes other than 0 and 1")
    return Bits(array, dtype) if dtype in _AS_BITS else array


def widen(t: Tensor, dtype: str, what: str) -> Tensor:
    """Convert ``t`` to ``dtype`` if that is exact (F16 or BF16 to F32 to F64); else refuse."""
    have = dtype_of(t)
    if have == dtype:
        return t
    if (have, dtype) not in _EXACT:
        why = "that would round" if have in _FLOATS else "that is no floating-point dtype"
        raise Invalid(
            f"{what} is {dtype_name(have)} and the session is {dtype_name(dtype)}: {why}; "
            f"convert it to {dtype_name(dtype)} first"
        )
    return narrow(t, dtype)


def narrow(t: Tensor, dtype: str) -> Tensor:
    """Convert between floating-point dtypes, rounding to nearest even as torch's ``to`` does."""
    have = dtype_of(t)
    if have == dtype:
        return t
    if have not in _FLOATS or dtype not in _FLOATS:
        raise Invalid(f"cannot convert {dtype_name(have)} to {dtype_name(dtype)}")
    values = t.to_float32() if isinstance(t, Bits) else t
    if dtype == "BF16":
        return Bits.bfloat16(values)
    with np.errstate(over="ignore"):
        if dtype == "F16":  # torch goes from float64 through float32
            values = values.astype(np.float32, copy=False)
        return values.astype(numpy_dtype(dtype))


_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_EXACT = frozenset(
    {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}
)


def check_id(kind: str, value: str) -> None:
    """Refuse a session id or worker name that is not ``[A-Za-z0-9._-]{1,128}``.

    ``.`` and ``..`` are refused too: as path segments they would name another URL or folder.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise Invalid(f"{kind} must match [A-Za-z0-9._-]{{1,128}}, got {_short(value)}")
    if value in {".", ".."}:
        raise Invalid(f"{kind} must not be '.' or '..', got {value!r}")


def check_param_name(name: str) -> None:
    """Refuse what is not 1-256 bytes of UTF-8 without control characters, or ``__metadata__``."""
    if not isinstance(name, str):
        raise Invalid(f"a parameter name must be a string, got {_short(name)}")
    if why := text_fault(name):
        raise Invalid(f"parameter name {_short(name)} {why}")
    if (size := len(name.encode())) > 256:
        raise Invalid(f"parameter name {_short(name)} has {size} bytes, the limit is 256")
    if name == "__metadata__":
        raise Invalid("no parameter may be called '__metadata__'")


def text_fault(name: str) -> str | None:
    """Say what is wrong with ``name`` as the name of a tensor of any kind, or None."""
    if not name:
        return "is empty"
    if found := _CONTROL.search(name):
        return f"holds the control character U+{ord(found[0]):04X}"
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        return f"is not UTF-8: it holds the lone surrogate U+{ord(name[exc.start]):04X}"
    return None


def _short(value: object) -> str:
    """Return repr(value), cut so that a hostile value cannot fill a log."""
    text = repr(value[:80]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
