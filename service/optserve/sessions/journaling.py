"""The journal's copy of a large body, written by another thread while the rest still arrives."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import xxhash

from optserve.sessions.turn import Executor
from optserve.store import Payload
from optserve.store.base import BytesLike
from optserve_client.errors import OptserveError

#: Smaller bodies are written by whoever reads them: another thread costs more.
BEHIND_BYTES = 2**20
#: What may wait to be written of a body that lies nowhere else, before no more of it is read.
MOST_BEHIND_BYTES = 2**24
#: Larger gradients are not kept in a session of durability ``memory``.
KEPT_BYTES = 2**20


class Unkept:
    """Takes bytes for their digest alone.

    A session of durability ``memory`` would fill the disk with gradients, as fast as it is stepped,
    for nothing but a failure in the middle of an update; then it goes back to its last snapshot.
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def write(self, chunk: BytesLike) -> None:
        self._hash.update(chunk)

    def digest(self) -> bytes:
        return self._hash.digest()

    def seal(self) -> None:
        return None

    def discard(self) -> None:
        """There is nothing."""


class Writer(Protocol):
    """What bytes of a body are written to; see :class:`optserve.store.base.PayloadWriter`."""

    def write(self, chunk: BytesLike) -> None: ...
    def digest(self) -> bytes: ...
    def seal(self) -> Payload | None: ...
    def discard(self) -> None: ...


class Journaling:
    """Hashes and writes pieces of memory in the order in which they were added.

    The memory must stay as it is until :meth:`drain` has returned, or :meth:`abandon` has called
    back. One thread adds, one ends.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def add(self, piece: memoryview) -> None:
        """Write ``piece``, now or soon. Raises what an earlier write has met."""
        self._writer.write(piece)

    def behind(self, tell: Callable[[], object]) -> bool:
        """Return whether so much waits to be written that no more should be added; then ``tell`` is
        called once that is over, on another thread."""
        return False

    def drain(self) -> None:
        """Return once everything is written."""

    def seal(self) -> tuple[bytes, Payload | None]:
        """Return digest and payload, if one is kept, after :meth:`drain`."""
        return self._writer.digest(), self._writer.seal()

    def abandon(self, release: Callable[[], None]) -> None:
        """Forget everything, and call ``release`` once nobody reads the memory any more."""
        self._writer.discard()
        release()


class JournalingBehind(Journaling):
    """The same on a thread of ``executor``, as far as it keeps up."""

    def __init__(self, writer: Writer, executor: Executor) -> None:
        super().__init__(writer)
        self._executor = executor
        self._todo: deque[memoryview] = deque()
        #: Bytes that wait, and those that a job is writing.
        self._waiting = self._in_hand = 0
        self._tell: Callable[[], object] | None = None
        self._error: BaseException | None = None
        #: What a job that writes is to do at its end.
        self._release: Callable[[], None] | None = None
        #: A job of the executor was asked for; it writes.
        self._asked = self._writing = False
        self._changed = threading.Condition()

    def add(self, piece: memoryview) -> None:
        with self._changed:
            self._check()
            self._todo.append(piece)
            self._waiting += len(piece)
            if self._asked or self._waiting < BEHIND_BYTES:
                return
            self._asked = True
        try:
            self._executor.submit(self._job)
        except OptserveError:
            self._asked = False
            raise

    def behind(self, tell: Callable[[], object]) -> bool:
        with self._changed:
            if self._waiting + self._in_hand < MOST_BEHIND_BYTES:
                return False
            self._tell = tell
            return True

    def drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._check()
            for piece in self._todo:
                self._writer.write(piece)
            self._todo.clear()

    def abandon(self, release: Callable[[], None]) -> None:
        with self._changed:
            self._todo.clear()
            if self._writing:
                self._release = release  # which is the job's then
                return
        super().abandon(release)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _job(self) -> None:
        while pieces := self._next():
            try:
                for piece in pieces:
                    self._writer.write(piece)
            except BaseException as exc:
                self._error = exc
        if self._release is not None:
            super().abandon(self._release)

    def _next(self) -> deque[memoryview]:
        """Return what is to be written next; nothing ends the job."""
        with self._changed:
            pieces, self._todo, self._in_hand, self._waiting = self._todo, deque(), self._waiting, 0
            if self._error is not None:
                pieces.clear()
                self._in_hand = 0
            tell = None
            if self._in_hand < MOST_BEHIND_BYTES:
                tell, self._tell = self._tell, None
            if not pieces:
                self._asked = False
            self._writing = bool(pieces)
            self._changed.notify_all()
        if tell is not None:
            tell()
        return pieces
