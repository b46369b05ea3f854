"""Payloads outside the heap: small ones are bytes, large ones lie in unlinked temporary files.

An unlinked file vanishes with the process, however that ends. One file per payload would need one
descriptor per event, so payloads share files (segments); only one writer at a time appends to a
segment. A segment is closed when the last payload in it is garbage: no reader ever meets a closed
descriptor.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from optserve.store.base import CHUNK_BYTES, BytesLike, Payload
from optserve_client.errors import Damaged, Unavailable

#: Payloads up to this size stay in memory.
INLINE_BYTES = 64 * 2**10
#: A segment takes no further payload once it is this long, and a payload announced as this large
#: gets one of its own, so that nothing small pins it.
SEGMENT_BYTES = 16 * 2**20
#: Segments that wait for their next writer; each may hold room on disk.
IDLE_SEGMENTS = 4


class Segment:
    """An unlinked file that payloads are appended to."""

    def __init__(self, directory: str) -> None:
        # Unlinked files leave the directory empty, which is what cleaners of /tmp look for.
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.fd, path = tempfile.mkstemp(dir=directory)
        os.unlink(path)
        self.end = 0
        weakref.finalize(self, os.close, self.fd)


class InlinePayload:
    """A payload in memory."""

    __slots__ = ("_data", "digest")

    def __init__(self, data: bytes, digest: bytes) -> None:
        self._data = data
        self.digest = digest

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        self._check()
        whole = memoryview(self._data)
        return (whole[at : at + size] for at in range(0, len(whole), size))

    def pread(self, nbytes: int, at: int) -> memoryview:
        return memoryview(self._data)[at : at + nbytes]

    def read(self) -> bytes:
        self._check()
        return self._data

    def _check(self) -> None:
        """The bytes may come from a table."""
        if xxhash.xxh3_128_digest(self._data) != self.digest:
            raise Damaged(f"a payload of {self.nbytes} bytes does not have its digest")

    def discard(self) -> None:
        """Nothing to do: the bytes go with the last reference."""


def checked(
    pread: Callable[[int, int], bytes],
    nbytes: int,
    digest: bytes,
    damaged: Callable[[str], Damaged],
    size: int = CHUNK_BYTES,
) -> Iterator[memoryview]:
    """Yield what ``pread(length, offset)`` finds; ``damaged`` makes a sentence of what is wrong.

    The bytes are compared with ``digest`` before the last piece goes out, so whoever counts the
    bytes and stops there is told too.
    """
    seen, at = xxhash.xxh3_128(), 0
    while at < nbytes:
        piece = pread(min(size, nbytes - at), at)
        if not piece:
            raise damaged(f"ends after {at} of {nbytes} bytes")
        seen.update(piece)
        at += len(piece)
        if at == nbytes and seen.digest() != digest:
            raise damaged("does not have its digest")
        yield memoryview(piece)


def checked_whole(
    pread: Callable[[int, int], bytes],
    nbytes: int,
    digest: bytes,
    damaged: Callable[[str], Damaged],
) -> bytes:
    """Return all bytes in one block: a hundred pieces would leave holes in the heap behind."""
    whole = pread(nbytes, 0)
    if len(whole) < nbytes:  # Linux reads at most 2 GiB at once
        return b"".join(checked(pread, nbytes, digest, damaged))
    if xxhash.xxh3_128_digest(whole) != digest:
        raise damaged("does not have its digest")
    return whole


class SpooledPayload:
    """A payload in a segment."""

    __slots__ = ("_begin", "_segment", "digest", "nbytes")

    def __init__(self, segment: Segment, begin: int, nbytes: int, digest: bytes) -> None:
        self._segment = segment
        self._begin = begin
        self.nbytes = nbytes
        self.digest = digest

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        return checked(self.pread, self.nbytes, self.digest, self._damaged, size)

    def read(self) -> bytes:
        return checked_whole(self.pread, self.nbytes, self.digest, self._damaged)

    def pread(self, nbytes: int, at: int) -> bytes:
        try:
            return os.pread(self._segment.fd, nbytes, self._begin + at)
        except OSError as exc:
            raise self._damaged(f"cannot be read: {exc.strerror}") from exc

    @staticmethod
    def _damaged(why: str) -> Damaged:
        return Damaged(f"a spooled payload {why}")

    def discard(self) -> None:
        """Nothing to do: the segment goes with its last payload."""


class BufferedWriter:
    """Hashes bytes as they arrive, and keeps them in memory as long as they are few.

    See :class:`optserve.store.base.PayloadWriter`. A subclass says where many go.
    """

    def __init__(self, size_hint: int) -> None:
        self._hash = xxhash.xxh3_128()
        self._buffer = bytearray()
        self._begun = False
        self._open = True
        self._size_hint = size_hint
        self.nbytes = 0

    def write(self, chunk: BytesLike) -> None:
        if not self._open:
            raise ValueError("the payload is sealed or discarded")
        piece = memoryview(chunk)
        if not piece.nbytes:
            return  # cast() refuses a view without elements
        piece = piece.cast("B")
        self._hash.update(piece)
        if not self._begun and max(self.nbytes + len(piece), self._size_hint) <= INLINE_BYTES:
            self._buffer += piece
        else:
            self._put_large(piece)
        self.nbytes += len(piece)

    def _put_large(self, piece: memoryview) -> None:
        try:
            if not self._begun:
                self._begin()
                self._begun = True
                buffered, self._buffer = self._buffer, bytearray()
                self._put(memoryview(buffered), 0)
            self._put(piece, self.nbytes)
        except BaseException:
            self.discard()  # a payload with a hole must not be sealed
            raise

    def digest(self) -> bytes:
        return self._hash.digest()

    def seal(self) -> Payload:
        if not self._open:
            raise ValueError("the payload is sealed or discarded")
        self._open = False
        if self._begun:
            return self._finish()
        data, self._buffer = bytes(self._buffer), bytearray()
        return InlinePayload(data, self.digest())

    def discard(self) -> None:
        if not self._open:
            return
        self._open = False
        self._buffer = bytearray()
        if self._begun:
            self._drop()

    def _begin(self) -> None:
        """Make the place for a large payload."""
        raise NotImplementedError

    def _put(self, piece: memoryview, at: int) -> None:
        """Write all of ``piece``, which comes ``at`` bytes after the payload's first."""
        raise NotImplementedError

    def _finish(self) -> Payload:
        """Return the payload; every byte was put."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Give back what :meth:`_begin` made."""
        raise NotImplementedError


class SpoolWriter(BufferedWriter):
    """Writes a large payload to the end of a segment."""

    _segment: Segment

    def __init__(self, spool: Spool, size_hint: int) -> None:
        super().__init__(size_hint)
        self._spool = spool

    def _begin(self) -> None:
        self._segment = self._spool.take_segment(self._size_hint)

    def _put(self, piece: memoryview, at: int) -> None:
        at += self._segment.end
        try:
            while piece:
                written = os.pwrite(self._segment.fd, piece, at)
                piece, at = piece[written:], at + written
        except OSError as exc:
            raise Unavailable(f"the spool takes no more bytes: {exc.strerror}") from exc

    def _finish(self) -> SpooledPayload:
        segment = self._segment
        payload = SpooledPayload(segment, segment.end, self.nbytes, self.digest())
        segment.end += self.nbytes
        self._hand_back()
        return payload

    def _drop(self) -> None:
        os.ftruncate(self._segment.fd, self._segment.end)
        self._hand_back()

    def _hand_back(self) -> None:
        segment = self._segment
        del self._segment  # the payload alone keeps it alive
        self._spool.put_segment(segment)


class Spool:
    """The directory of the segments, and those that wait for a writer."""

    def __init__(self, parent: str | Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(
            prefix="optserve-spool-", dir=parent, ignore_cleanup_errors=True
        )
        self._lock = threading.Lock()
        self._idle: list[Segment] = []
        self._closed = False

    def writer(self, size_hint: int | None = None) -> SpoolWriter:
        if self._closed:
            raise Unavailable("the store is closed")
        return SpoolWriter(self, size_hint or 0)

    def take_segment(self, size_hint: int) -> Segment:
        """Return a segment that nobody else writes to."""
        with self._lock:
            if self._idle and size_hint < SEGMENT_BYTES:
                return self._idle.pop()
        try:
            return Segment(self._directory.name)
        except OSError as exc:
            raise Unavailable(f"the spool takes no more bytes: {exc.strerror}") from exc

    def put_segment(self, segment: Segment) -> None:
        with self._lock:
            room = len(self._idle) < IDLE_SEGMENTS and not self._closed
            if room and segment.end < SEGMENT_BYTES:
                self._idle.append(segment)

    def close(self) -> None:
        """Remove the directory. Payloads that somebody still holds stay readable."""
        with self._lock:
            self._closed = True
            self._idle.clear()
        self._directory.cleanup()
