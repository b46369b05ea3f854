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
from collections.abc import Iterator
from pathlib import Path

import xxhash

from optserve.store.base import CHUNK_BYTES, BytesLike
from optserve_client.errors import Unavailable

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
        whole = memoryview(self._data)
        return (whole[at : at + size] for at in range(0, len(whole), size))

    def read(self) -> bytes:
        return self._data

    def discard(self) -> None:
        """Nothing to do: the bytes go with the last reference."""


class SpooledPayload:
    """A payload in a segment."""

    __slots__ = ("_begin", "_segment", "digest", "nbytes")

    def __init__(self, segment: Segment, begin: int, nbytes: int, digest: bytes) -> None:
        self._segment = segment
        self._begin = begin
        self.nbytes = nbytes
        self.digest = digest

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        at = 0
        while at < self.nbytes:
            piece = os.pread(self._segment.fd, min(size, self.nbytes - at), self._begin + at)
            if not piece:
                raise Unavailable(f"a spooled payload ends after {at} of {self.nbytes} bytes")
            yield memoryview(piece)
            at += len(piece)

    def read(self) -> bytes:
        # One block of the right size: a hundred pieces would leave holes in the heap behind.
        whole = os.pread(self._segment.fd, self.nbytes, self._begin)
        # Linux reads at most 2 GiB at once.
        return whole if len(whole) == self.nbytes else b"".join(self.chunks())

    def discard(self) -> None:
        """Nothing to do: the segment goes with its last payload."""


class SpoolWriter:
    """Hashes and keeps bytes as they arrive; see :class:`optserve.store.base.PayloadWriter`."""

    def __init__(self, spool: Spool, size_hint: int) -> None:
        self._spool = spool
        self._hash = xxhash.xxh3_128()
        self._buffer = bytearray()
        self._segment: Segment | None = None
        self._begin = 0
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
        if self._segment is None and max(self.nbytes + len(piece), self._size_hint) > INLINE_BYTES:
            self._segment = self._spool.take_segment(self._size_hint)
            self._begin = self._segment.end
            buffered, self._buffer = self._buffer, bytearray()
            self._put(memoryview(buffered), self._begin)
        if self._segment is None:
            self._buffer += piece
        else:
            self._put(piece, self._begin + self.nbytes)
        self.nbytes += len(piece)

    def _put(self, piece: memoryview, at: int) -> None:
        assert self._segment is not None
        try:
            while piece:
                written = os.pwrite(self._segment.fd, piece, at)
                piece, at = piece[written:], at + written
        except OSError as exc:
            raise Unavailable(f"the spool takes no more bytes: {exc.strerror}") from exc

    def digest(self) -> bytes:
        return self._hash.digest()

    def seal(self) -> InlinePayload | SpooledPayload:
        if not self._open:
            raise ValueError("the payload is sealed or discarded")
        self._open = False
        if self._segment is None:
            data, self._buffer = bytes(self._buffer), bytearray()
            return InlinePayload(data, self.digest())
        payload = SpooledPayload(self._segment, self._begin, self.nbytes, self.digest())
        self._segment.end = self._begin + self.nbytes
        self._hand_back()
        return payload

    def discard(self) -> None:
        if not self._open:
            return
        self._open = False
        self._buffer = bytearray()
        if self._segment is not None:
            os.ftruncate(self._segment.fd, self._begin)
            self._hand_back()

    def _hand_back(self) -> None:
        segment, self._segment = self._segment, None
        assert segment is not None
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
