"""Gradients in fewer bytes: some of the elements, or each of them with fewer bits.

    session.step(grads, compress=TopK(0.01))

What a step did not send is not lost. The client keeps it for the session and adds it to the next
gradient (error feedback: Seide et al. 2014, "1-bit SGD"; Karimireddy et al. 2019, "Error feedback
fixes SignSGD"). It moves on with a step that the server has applied, and stays as it is with one
that was refused or skipped. The server computes with the dense gradient that the tensors stand for.

A tensor that would not become smaller is sent whole, and so is a gradient with a NaN or Infinity in
it, which is for the server to refuse or to skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from optserve_client import errors, wire
from optserve_client.wire import Array, Bits, Tensor

__all__ = ["Compressor", "Encoded", "Half", "Int8", "TopK"]

#: Elements that are looked at together, while they, and what is made of them, are in the cache.
_PIECE = 2**16
#: Of an entry in a frame's header, about.
_ENTRY_BYTES = 100
#: Values from here on are rounded to infinity.
_TOO_LARGE = {"F16": 65520.0, "BF16": float.fromhex("0x1.ffp127"), "F32": 2.0**128}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """What is sent of one gradient."""

    #: By their names in the frame.
    tensors: dict[str, Tensor]
    #: What these leave out: the gradient, and what it was encoded with, minus what the server makes
    #: of the tensors; flat, float32 or float64. None: what was unsent before still is.
    unsent: Array | None
    #: What the step has to say besides.
    fields: Mapping[str, Any] = field(default_factory=dict)


class Compressor(Protocol):
    """Says in fewer bytes what a gradient is. It remembers nothing: steps, sessions and threads may
    share one."""

    @property
    def error_feedback(self) -> bool:
        """Whether what was not sent is added to the next gradient."""

    def encode(
        self, name: str, gradient: Tensor, unsent: Array | None = None, *, room: Array | None = None
    ) -> Encoded:
        """Return what to send of ``gradient`` plus ``unsent``, a flat array of an earlier one.

        The same arguments give the same bytes. ``gradient`` has the session's dtype, or one that it
        is widened from; ``room``, of the kind and size of ``unsent``, is written over and may
        become part of what is returned.
        """


@dataclass(frozen=True, slots=True)
class TopK:
    """Sends the ``fraction`` of each tensor's elements whose absolute values are largest."""

    #: At least one element of each tensor is sent.
    fraction: float = 0.01
    #: Of the values on the wire, unless the gradient's own is narrower.
    dtype: str = "float32"
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise errors.Invalid(f"fraction must be in (0, 1], got {self.fraction!r:.80}")
        _check_float(self.dtype)

    def encode(
        self, name: str, gradient: Tensor, unsent: Array | None = None, *, room: Array | None = None
    ) -> Encoded:
        own, total = _own(gradient), _total(gradient, unsent, room)
        if total is None:
            return _as_it_is(name, gradient)
        count = min(total.size, math.ceil(self.fraction * total.size))
        tag, index = _narrower(self.dtype, own), _index_dtype(total.size)
        nbytes = count * (index.itemsize + wire.itemsize(tag)) + _ENTRY_BYTES
        if nbytes >= wire.nbytes(own, (total.size,)):
            return _whole(name, total, own, gradient.shape)
        chosen = _largest(total, count)
        values = total[chosen]
        if _overflows(values, tag):
            tag = own
        sent = wire.narrow(values, tag)
        total[chosen] -= _wide(sent)
        return Encoded(
            tensors={f"topk/{name}/indices": chosen.astype(index), f"topk/{name}/values": sent},
            unsent=total,
        )


@dataclass(frozen=True, slots=True)
class Int8:
    """Sends 8 bits of each element: multiples, from -127 to 127, of a 127th of the largest absolute
    value in its block."""

    #: Elements of the flattened tensor that share a scale.
    block: int = 256
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or not 1 <= self.block < 2**63:
            raise errors.Invalid(f"block must be an integer >= 1, got {self.block!r:.80}")

    def encode(
        self, name: str, gradient: Tensor, unsent: Array | None = None, *, room: Array | None = None
    ) -> Encoded:
        own, total = _own(gradient), _total(gradient, unsent, room)
        if total is None:
            return _as_it_is(name, gradient)
        values = np.empty(total.size, np.int8)
        scales = np.empty(-(-total.size // self.block), np.float32)
        if values.nbytes + scales.nbytes + _ENTRY_BYTES >= wire.nbytes(own, (total.size,)):
            return _whole(name, total, own, gradient.shape)
        if own == "F64" and _overflows(total, "F32"):  # no float32 scales that
            return _whole(name, total, own, gradient.shape)
        scratch: Array = np.empty(0)
        for at, rows in _blocks(total, self.block):
            begin = at // self.block
            steps = scratch = np.abs(rows, out=scratch if scratch.shape == rows.shape else None)
            by = scales[begin : begin + len(rows)]
            by[:] = _scales(steps.max(axis=1))
            with np.errstate(divide="ignore"):
                inverse = np.where(by > 0, 1 / by.astype(rows.dtype), 0)
            np.rint(np.multiply(rows, inverse[:, None], out=steps), out=steps)
            values[at : at + rows.size] = steps.reshape(-1)
            steps *= by[:, None]
            rows -= _wide(wire.narrow(steps, own)) if own == "BF16" else steps
        return Encoded(
            tensors={
                f"int8/{name}/values": values.reshape(gradient.shape),
                f"int8/{name}/scales": scales,
            },
            unsent=total,
            fields={} if self.block == 256 else {"int8_block": self.block},
        )


@dataclass(frozen=True, slots=True)
class Half:
    """Sends each element in 16 bits, rounded to nearest even."""

    #: ``bfloat16``, with float32's range, or ``float16``, which is finer up to 65504.
    dtype: str = "bfloat16"
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if _check_float(self.dtype) not in ("BF16", "F16"):
            raise errors.Invalid(f"dtype must be bfloat16 or float16, got {self.dtype!r:.80}")

    def encode(
        self, name: str, gradient: Tensor, unsent: Array | None = None, *, room: Array | None = None
    ) -> Encoded:
        own, total = _own(gradient), _total(gradient, unsent, room)
        if total is None:
            return _as_it_is(name, gradient)
        tag = _narrower(self.dtype, own)
        if _overflows(total, tag):
            return _whole(name, total, own, gradient.shape)
        bits = np.empty(total.size, wire.numpy_dtype(tag))
        for at in range(0, total.size, _PIECE):
            piece = total[at : at + _PIECE]
            sent = wire.narrow(piece, tag)
            bits[at : at + _PIECE] = sent.array if isinstance(sent, Bits) else sent
            piece -= _wide(sent)
        bits = bits.reshape(gradient.shape)
        tensor: Tensor = Bits(bits, tag) if tag == "BF16" else bits
        return Encoded(tensors={f"grad/{name}": tensor}, unsent=total)


# --- what is sent whole --------------------------------------------------------------------------


def _as_it_is(name: str, gradient: Tensor) -> Encoded:
    return Encoded(tensors={f"grad/{name}": gradient}, unsent=None)


def _whole(name: str, total: Array, own: str, shape: tuple[int, ...]) -> Encoded:
    """Return all of ``total`` in the gradient's own dtype; what that rounds off is unsent."""
    sent = wire.narrow(total.reshape(shape), own)
    wide = _wide(sent)
    exact = wire.dtype_of(total) == own
    left = np.zeros(total.size, total.dtype) if exact else total - wide.reshape(-1)
    return Encoded(tensors={f"grad/{name}": sent}, unsent=left)


# --- numbers -------------------------------------------------------------------------------------


def _check_float(dtype: str) -> str:
    tag = wire.dtype_tag(dtype)
    if tag not in _FLOATS:
        raise errors.Invalid(f"dtype must be a floating-point dtype, got {dtype!r:.80}")
    return tag


def _own(gradient: Tensor) -> str:
    """Return the dtype in which all of a gradient can be sent. No session is in float16."""
    tag = wire.dtype_of(gradient)
    return "F32" if tag == "F16" else tag


def _narrower(dtype: str, own: str) -> str:
    """Return the tag of ``dtype``, or ``own`` if that is as narrow: the session may be in it."""
    tag = wire.dtype_tag(dtype)
    return tag if wire.itemsize(tag) < wire.itemsize(own) else own


def _wide(tensor: Tensor) -> Array:
    return tensor.to_float32() if isinstance(tensor, Bits) else tensor


def _index_dtype(size: int) -> np.dtype[Any]:
    return np.dtype("<i4" if size <= 2**31 else "<i8")


def _overflows(values: Array, tag: str) -> bool:
    """Return whether one of ``values`` would become infinite in the dtype ``tag``."""
    if tag not in _TOO_LARGE or not values.size:
        return False
    largest = max(float(values.max()), -float(values.min()))
    # float64 is rounded to float32 on the way.
    return largest >= 2.0**127 * (2 - 2.0**-24) or float(np.float32(largest)) >= _TOO_LARGE[tag]


def _total(gradient: Tensor, unsent: Array | None, room: Array | None) -> Array | None:
    """Return a flat copy of ``gradient`` plus ``unsent``, as float64 if it is that, else float32.

    None if there is nothing to compress: what the server does not take, a NaN or an Infinity.
    """
    own = wire.dtype_of(gradient)
    if own not in _FLOATS:
        return None
    flat = _wide(gradient).reshape(-1)
    dtype = np.dtype(np.float64 if own == "F64" else np.float32)
    if room is None or room.shape != flat.shape or room.dtype != dtype:
        room = np.empty(flat.shape, dtype)
    for at in range(0, flat.size, _PIECE):
        piece, more = room[at : at + _PIECE], flat[at : at + _PIECE]
        with np.errstate(over="ignore", invalid="ignore"):
            if unsent is None:
                piece[:] = more
            else:
                np.add(more, unsent[at : at + _PIECE], out=piece)
            # One product of all is faster than to look at each, and may only overflow.
            if not (math.isfinite(np.dot(piece, piece)) or np.isfinite(piece).all()):
                return None
    return room


def _largest(values: Array, count: int) -> Array:
    """Return the indices of the ``count`` largest absolute values, in their order; of fewer, if
    the others are zero."""
    indices = _reaching(values, bound := _bound(values, count))
    if bound and len(indices) < count:  # the sample was none of the whole
        indices = _reaching(values, 0.0)
    if len(indices) > count:
        sizes = np.abs(values[indices])
        indices = indices[np.argpartition(sizes, len(sizes) - count)[len(sizes) - count :]]
        indices.sort()
    return indices


def _reaching(values: Array, bound: float) -> Array:
    """Return the indices of what is not zero and, absolutely, at least ``bound``."""
    found = [np.empty(0, np.int64)]
    for at in range(0, values.size, _PIECE):
        sizes = np.abs(values[at : at + _PIECE])
        found.append(np.flatnonzero(sizes >= bound if bound else sizes) + at)
    return np.concatenate(found)


def _bound(values: Array, count: int) -> float:
    """Return what, as a rule, somewhat more than ``count`` absolute values reach, from a sample."""
    sample = np.abs(values[:: max(1, values.size // 2**16)])
    wanted = math.ceil(1.25 * count * len(sample) / max(values.size, 1)) + 16
    if wanted >= len(sample):
        return 0.0
    return float(np.partition(sample, len(sample) - wanted)[len(sample) - wanted])


def _blocks(total: Array, block: int) -> Iterator[tuple[int, Array]]:
    """Yield views of ``total`` whose rows are blocks, and where each begins."""
    rows = max(1, _PIECE // block)
    whole = total.size // block * block
    for at in range(0, whole, rows * block):
        yield at, total[at : min(at + rows * block, whole)].reshape(-1, block)
    if whole < total.size:
        yield whole, total[whole:].reshape(1, -1)


def _scales(largest: Array) -> Array:
    """Return a 127th of each of the ``largest`` absolute values, such that 127 times it is finite.

    Where that is no normal number, 0: all of the block is unsent.
    """
    scales: Array = (largest / 127).astype(np.float32)
    limits = np.finfo(np.float32)
    scales[scales < limits.tiny] = 0
    with np.errstate(over="ignore"):
        scales[np.isinf(scales * np.float32(127))] = np.nextafter(limits.max / 127, 0)
    return scales
