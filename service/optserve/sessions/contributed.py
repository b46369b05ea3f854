"""The gradients in the pushes of a round, read from the journal piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from optserve.optim.arena import GradientBuffer
from optserve.sessions.fields import StepFields
from optserve.sessions.intake import Step, StepIntake, read_fields
from optserve.sessions.round import Contribution
from optserve.sessions.step import Expected, Lease
from optserve.store.base import Payload
from optserve_client import wire

if TYPE_CHECKING:
    from optserve.optim.gradients import Coo
    from optserve.optim.reduce import Source

_PREFIX_BYTES = 8


@contextmanager
def opened(contributions: list[Contribution], expected: Expected) -> Iterator[list[Source]]:
    """Yield the gradients of ``contributions``, to be read once, in the order of the session."""
    with ExitStack() as stack:
        sources: list[Source] = []
        for contribution in contributions:
            stream = Stream(contribution.payload)
            stack.callback(stream.close)
            if stream.fits(expected):
                sources.append(stream)
            else:  # in another order, sparse or compressed: as a whole
                # Not of the pool, where all that a round needs could be too much at a time.
                lease = partial(GradientBuffer, expected.dense, lambda _: None)
                sources.append(Decoded(decode(contribution.payload, expected, lease)))
        yield sources


def decode(payload: Payload, expected: Expected, lease: Lease) -> Step:
    """Return the step whose wire bytes the journal holds."""
    intake = StepIntake(expected=expected, lease=lease, writer=None)
    for chunk in payload.chunks():
        intake.feed(chunk)
    return intake.finish()


class Stream:
    """The dense tensors of a frame that come in the session's order."""

    def __init__(self, payload: Payload) -> None:
        self._chunks = iter(payload.chunks())
        self._piece = memoryview(b"")
        length = wire.header_length(self._take(_PREFIX_BYTES))
        header = wire.parse_header(self._take(length))
        self._tensors = header.tensors
        self.loss_scale = StepFields.parse(read_fields(header.metadata)).loss_scale
        self._infos: dict[str, wire.TensorInfo] = {}

    def close(self) -> None:
        """Read no more."""
        self._chunks = iter(())

    def fits(self, expected: Expected) -> bool:
        """Say whether the tensors can be read as they come."""
        self._infos = {
            info.name.removeprefix(f"{expected.kind}/"): info
            for info in self._tensors
            if info.name.startswith(f"{expected.kind}/")
        }
        wanted = [name for name in expected.layout.names if name in self._infos]
        return len(self._infos) == len(self._tensors) and list(self._infos) == wanted

    def has(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        tag = self._infos[name].dtype
        return self._take(count * wire.itemsize(tag)), tag

    def coo(self, name: str) -> Coo:
        raise AssertionError("a stream has no sparse gradients")

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
    """A push that was read as a whole."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.loss_scale = step.fields.loss_scale
        step.buffer.widen()
        self._at: dict[str, int] = {}

    def has(self, name: str) -> bool:
        return name not in self.step.none

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        dtype = self.step.buffer.layout.dtype
        at = self._at.get(name, 0)
        end = self._at[name] = at + count * wire.itemsize(dtype)
        return self.step.buffer.view(name)[at:end], dtype

    def coo(self, name: str) -> Coo:
        return self.step.sparse[name]
