"""The gradients in the pushes of a round, read from the journal piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from optserve.sessions import compressed
from optserve.sessions.fields import StepFields
from optserve.sessions.intake import Sparse, read_fields
from optserve.sessions.round import Contribution
from optserve.sessions.step import Expected
from optserve.store.base import Payload
from optserve_client import wire
from optserve_client.errors import Damaged, Invalid, Malformed

if TYPE_CHECKING:
    from optserve.optim.gradients import Coo
    from optserve.optim.reduce import Source

_PREFIX_BYTES = 8
#: Bytes that are read of all pushes together, and at least of each.
_MOST, _LEAST = 2**24, 2**16
#: Entries of a top-k gradient that are read together.
_ENTRIES = 2**14
#: Kinds of tensors of which two make a gradient.
_IN_HALVES = {"sparse", *compressed.HALVES}

#: Returns elements ``[begin, end)`` of a flat tensor.
Read = Callable[[int, int], wire.Tensor]
#: Returns the next elements of a dense gradient in memory of their own, and their dtype.
Next = Callable[[int], tuple[memoryview, str]]


@contextmanager
def opened(contributions: list[Contribution], expected: Expected) -> Iterator[list[Source]]:
    """Yield the gradients of ``contributions``, to be read once, in the order of the session."""
    piece_bytes = max(_LEAST, _MOST // len(contributions))
    with ExitStack() as stack:
        sources: list[Source] = []
        for contribution in contributions:
            frame = Frame(contribution.payload, expected, piece_bytes)
            stack.callback(frame.close)
            sources.append(frame)
        yield sources


class Frame:
    """The gradient in one push. What is not as the update wants it, in another order or compressed,
    is read from where it lies; so a piece of it is all that is ever in memory."""

    def __init__(self, payload: Payload, expected: Expected, piece_bytes: int) -> None:
        self._expected = expected
        try:
            length = wire.header_length(_read(payload, 0, _PREFIX_BYTES))
            header = wire.parse_header(_read(payload, _PREFIX_BYTES, length))
            self._fields = StepFields.parse(read_fields(header.metadata))
        except (Malformed, Invalid) as exc:
            raise Damaged(f"a push in the journal cannot be read: {exc}") from exc
        self._data_at = _PREFIX_BYTES + length
        self.loss_scale = self._fields.loss_scale
        #: The tensors of each parameter.
        self._infos: dict[str, list[wire.TensorInfo]] = {}
        names = [_parameter(info.name) for info in header.tensors]
        for name, info in zip(names, header.tensors, strict=True):
            self._infos.setdefault(name, []).append(info)
        ordered = [name for name in expected.layout.names if name in self._infos]
        #: Each gradient is one dense tensor, and they come in the session's order.
        plain = names == ordered
        self._bytes = Streamed(payload, piece_bytes) if plain else Anywhere(payload)
        self._current: tuple[str, Next] | None = None

    def close(self) -> None:
        """Read no more."""
        self._bytes.close()

    def has(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        if self._current is None or self._current[0] != name:
            self._current = (name, self._dense(name))
        return self._current[1](count)

    def coo(self, name: str) -> Coo:
        layout = self._expected.layout
        half = {info.name.rpartition("/")[2]: info for info in self._infos[name]}
        indices, values = (self._tensor(half[which]) for which in ("indices", "values"))
        assert isinstance(indices, np.ndarray)
        values = wire.widen(values, layout.dtype, half["values"].name)
        return Sparse(indices=indices, values=values, shape=layout.by_name[name].shape)

    def _dense(self, name: str) -> Next:
        """Return what reads the dense gradient of one parameter."""
        first, *more = self._infos[name]
        if not more:
            return Dense(partial(self._part, first))
        half = {info.name.rpartition("/")[2]: info for info in (first, *more)}
        values, dtype = partial(self._part, half["values"]), self._expected.layout.dtype
        if "indices" in half:
            [count] = half["indices"].shape
            return TopK(partial(self._part, half["indices"]), values, count, dtype)
        block = self._fields.int8_block or compressed.INT8_BLOCK
        return Int8(values, partial(self._part, half["scales"]), block, dtype)

    def _part(self, info: wire.TensorInfo, begin: int, end: int) -> wire.Tensor:
        """Return elements ``[begin, end)`` of a tensor, counted through."""
        size = wire.itemsize(info.dtype)
        raw = self._bytes(self._data_at + info.begin + begin * size, (end - begin) * size)
        return wire.from_bytes(info.dtype, (end - begin,), raw)

    def _tensor(self, info: wire.TensorInfo) -> wire.Tensor:
        raw = self._bytes(self._data_at + info.begin, info.end - info.begin)
        return wire.from_bytes(info.dtype, info.shape, raw)


class Streamed:
    """Bytes of a payload that are asked for in the order in which they lie there. Digest and bytes
    are compared on the way."""

    def __init__(self, payload: Payload, piece_bytes: int) -> None:
        self._chunks = iter(payload.chunks(piece_bytes))
        self._piece = memoryview(b"")
        self._at = 0

    def __call__(self, begin: int, nbytes: int) -> memoryview:
        """Return bytes in memory of their own, which is aligned for every dtype."""
        taken, done = np.empty(nbytes, np.uint8).data, 0
        while done < nbytes:
            found = self._piece[begin + done - self._at :][: nbytes - done]
            taken[done : done + len(found)] = found
            done += len(found)
            if done < nbytes:
                self._at += len(self._piece)
                self._piece = next(self._chunks)
        return taken

    def close(self) -> None:
        """Read no more."""
        self._chunks = iter(())


class Anywhere:
    """Bytes of a payload wherever they lie; all were compared with their digest before."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        for _ in payload.chunks():
            pass

    def __call__(self, begin: int, nbytes: int) -> memoryview:
        return _read(self._payload, begin, nbytes)

    def close(self) -> None:
        """Nothing is open."""


class Dense:
    """A gradient as it is, narrower than the session perhaps."""

    def __init__(self, values: Read) -> None:
        self._values = values
        self._at = 0

    def __call__(self, count: int) -> tuple[memoryview, str]:
        begin, self._at = self._at, self._at + count
        values = self._values(begin, self._at)
        return _raw(values), wire.dtype_of(values)


class TopK:
    """A gradient of which the elements that are not zero came, ``count`` of them."""

    def __init__(self, indices: Read, values: Read, count: int, dtype: str) -> None:
        self._indices, self._values = indices, values
        self._count, self._dtype = count, dtype
        self._at = 0
        #: Entries that were read, and those of them whose turn has not come.
        self._entries = 0
        self._where = np.empty(0, np.int64)
        self._waiting = np.empty(0, wire.numpy_dtype(dtype))

    def __call__(self, count: int) -> tuple[memoryview, str]:
        dense, end = np.zeros(count, self._waiting.dtype), self._at + count
        while True:
            due = int(np.searchsorted(self._where, end))
            dense[self._where[:due] - self._at] = self._waiting[:due]
            self._where, self._waiting = self._where[due:], self._waiting[due:]
            if len(self._where) or self._entries == self._count:
                break
            self._load()
        self._at = end
        return _raw(dense), self._dtype

    def _load(self) -> None:
        begin, self._entries = self._entries, min(self._entries + _ENTRIES, self._count)
        self._where = _array(self._indices(begin, self._entries))
        values = self._values(begin, self._entries)
        self._waiting = _array(wire.widen(values, self._dtype, "values"))


class Int8:
    """A gradient in whole numbers, of which each block has a factor."""

    def __init__(self, values: Read, scales: Read, block: int, dtype: str) -> None:
        self._values, self._scales = values, scales
        self._block, self._dtype = block, dtype
        self._at = 0

    def __call__(self, count: int) -> tuple[memoryview, str]:
        begin, end = self._at, self._at + count
        first, last = begin // self._block, -(-end // self._block)
        edges = np.clip(np.arange(first, last + 1) * self._block, begin, end)
        wide = np.float64 if self._dtype == "F64" else np.float32
        dense = np.repeat(_array(self._scales(first, last)).astype(wide), np.diff(edges))
        dense *= _array(self._values(begin, end))
        self._at = end
        return _raw(wire.narrow(dense, self._dtype)), self._dtype


def _read(payload: Payload, begin: int, nbytes: int) -> memoryview:
    """Return bytes in memory of their own, which is aligned for every dtype."""
    taken, done = np.empty(nbytes, np.uint8).data, 0
    while done < nbytes:
        piece = payload.pread(nbytes - done, begin + done)
        if not piece:
            raise Damaged(f"a push in the journal ends after {begin + done} bytes")
        taken[done : done + len(piece)] = piece
        done += len(piece)
    return taken


def _array(tensor: wire.Tensor) -> np.ndarray:
    return tensor.array if isinstance(tensor, wire.Bits) else tensor


def _raw(tensor: wire.Tensor) -> memoryview:
    return _array(tensor).view(np.uint8).data


def _parameter(full_name: str) -> str:
    kind, _, rest = full_name.partition("/")
    return rest.rpartition("/")[0] if kind in _IN_HALVES else rest
