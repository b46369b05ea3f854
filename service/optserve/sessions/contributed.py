"""The gradients in the pushes of a round, read from the journal piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from optserve.optim.arena import GradientBuffer
from optserve.sessions import compressed
from optserve.sessions.fields import StepFields
from optserve.sessions.intake import Step, StepIntake, read_fields
from optserve.sessions.round import Contribution
from optserve.sessions.step import Expected, Lease
from optserve.store.base import BytesLike, Payload
from optserve_client import wire

if TYPE_CHECKING:
    from optserve.optim.gradients import Coo
    from optserve.optim.reduce import Source

_PREFIX_BYTES = 8
#: Bytes that are read of all pushes together, and at least of each.
_MOST, _LEAST = 2**24, 2**16
#: Kinds of tensors of which two make a gradient.
_IN_HALVES = {"sparse", *compressed.HALVES}


@contextmanager
def opened(contributions: list[Contribution], expected: Expected) -> Iterator[list[Source]]:
    """Yield the gradients of ``contributions``, to be read once, in the order of the session."""
    piece_bytes = max(_LEAST, _MOST // len(contributions))
    with ExitStack() as stack:
        sources: list[Source] = []
        for contribution in contributions:
            stream = Stream(contribution.payload, expected, piece_bytes)
            stack.callback(stream.close)
            sources.append(stream if stream.in_order else Whole(contribution.payload, expected))
        yield sources


def decode(pieces: Iterable[BytesLike], expected: Expected, lease: Lease) -> Step:
    """Return the step whose wire bytes the journal holds."""
    intake = StepIntake(expected=expected, lease=lease, writer=None)
    for piece in pieces:
        intake.feed(piece)
    return intake.finish()


class Stream:
    """A frame whose parameters come in the session's order: they are read as they come.

    A gradient that is compressed or sparse is decoded when its turn comes.
    """

    def __init__(self, payload: Payload, expected: Expected, piece_bytes: int) -> None:
        self._chunks = iter(payload.chunks(piece_bytes))
        self._piece = memoryview(b"")
        self._expected = expected
        length = wire.header_length(self._take(_PREFIX_BYTES))
        header = wire.parse_header(self._take(length))
        self._fields = StepFields.parse(read_fields(header.metadata))
        self.loss_scale = self._fields.loss_scale
        #: The tensors of each parameter.
        self._infos: dict[str, list[wire.TensorInfo]] = {}
        names = [_parameter(info.name) for info in header.tensors]
        for name, info in zip(names, header.tensors, strict=True):
            self._infos.setdefault(name, []).append(info)
        come = [name for name, _ in groupby(names)]
        #: Whether the parameters come one after the other, as the session has them.
        self.in_order = come == [name for name in expected.layout.names if name in self._infos]
        self._decoded: Decoded | None = None

    def close(self) -> None:
        """Read no more."""
        self._chunks = iter(())

    def has(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        [tag, *more] = [info.dtype for info in self._infos[name]]
        if not more:
            return self._take(count * wire.itemsize(tag)), tag
        if self._decoded is None or not self._decoded.has(name):
            self._decoded = Decoded(self._decode(name))
        return self._decoded.read(name, count)

    def coo(self, name: str) -> Coo:
        return self._decode(name).sparse[name]

    def _decode(self, name: str) -> Step:
        """Return the gradient of one parameter as a step of its own."""
        infos = self._infos[name]
        said = {} if self._fields.int8_block is None else {"int8_block": self._fields.int8_block}
        metadata = {wire.META_KEY: json.dumps(said)} if _is_int8(infos) else {}
        head = wire.encode_header([(i.name, i.dtype, i.shape) for i in infos], metadata)
        body = self._take(sum(info.end - info.begin for info in infos))
        whole = self._expected
        alone = Expected(
            layout=whole.layout.subset([name]), sparse=whole.sparse & {name}, kind=whole.kind
        )
        return decode([head, body], alone, partial(GradientBuffer, alone.dense, _unused))

    def _take(self, nbytes: int) -> memoryview:
        """Return the next bytes in memory of their own, which is aligned for every dtype."""
        taken = np.empty(nbytes, np.uint8).data
        at = 0
        while at < nbytes:
            if not self._piece:
                self._piece = next(self._chunks)
            count = min(nbytes - at, len(self._piece))
            taken[at : at + count] = self._piece[:count]
            self._piece, at = self._piece[count:], at + count
        return taken


class Decoded:
    """Gradients that lie in a buffer."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.loss_scale = step.fields.loss_scale
        step.buffer.widen()
        self._at: dict[str, int] = {}

    def has(self, name: str) -> bool:
        return name in self._step.expected.layout.by_name and name not in self._step.none

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        dtype = self._step.buffer.layout.dtype
        at = self._at.get(name, 0)
        end = self._at[name] = at + count * wire.itemsize(dtype)
        return self._step.buffer.view(name)[at:end], dtype

    def coo(self, name: str) -> Coo:
        return self._step.sparse[name]


class Whole(Decoded):
    """A frame in another order. Its buffer is not of the pool, where all that a round needs could
    be too much at a time."""

    def __init__(self, payload: Payload, expected: Expected) -> None:
        lease = partial(GradientBuffer, expected.dense, _unused)
        super().__init__(decode(payload.chunks(), expected, lease))


def _parameter(full_name: str) -> str:
    kind, _, rest = full_name.partition("/")
    return rest.rpartition("/")[0] if kind in _IN_HALVES else rest


def _is_int8(infos: list[wire.TensorInfo]) -> bool:
    return infos[0].name.startswith("int8/")


def _unused(buffer: GradientBuffer) -> None:
    """Nobody wants the buffer back."""
