"""Large payloads move to the medium while they are written, and their memory comes back.

Left to the system, each of them stays in its cache until memory runs short, and takes memory that
nobody has used for long: on a virtual machine whose host must find it first, that costs several
times what the writing costs. Given back at once, the same few pages serve one payload after the
other.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from optserve.store.disk import Disk
from optserve.store.held import HeldFile

#: Bytes that are worth a job: of 100 MB, the sync at the end then has little left to do.
PIECE_BYTES = 8 * 2**20
#: How far behind the end of what was handed to the medium memory is asked back: the medium has to
#: be done with it by then, or it stays.
LAG_BYTES = 16 * 2**20


class Behind:
    """A thread that follows all writers and promises nothing.

    A medium that is slower than a writer keeps this thread waiting, never the writer.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._thread = ThreadPoolExecutor(1, "payload-behind")
        #: A file whose end was still on its way to the medium when its last job ended.
        self._left: Path | None = None

    def trail(self, file: HeldFile, *, keep: bool) -> Trail:
        """Return what follows the writer of ``file``; ``keep``: its memory stays in use."""
        return Trail(self, file, keep)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def submit(
        self, file: HeldFile, begin: int, end: int, *, last: bool, keep: bool
    ) -> Future[None]:
        """Move these bytes, soon; ``last``: no more come. Raises RuntimeError after close."""
        return self._thread.submit(self._move, file, begin, end, last, keep)

    def _move(self, file: HeldFile, begin: int, end: int, last: bool, keep: bool) -> None:
        self._forget_left()
        with contextlib.suppress(OSError):  # it is the sync that must not fail
            try:
                fd = file.hold()
                self._disk.write_back(fd, begin, end - begin)
                if end > LAG_BYTES and not keep:
                    self._disk.forget(fd, end - LAG_BYTES)
            finally:
                file.release()
        if last and not keep:
            self._left = file.path

    def _forget_left(self) -> None:
        path, self._left = self._left, None
        if path is None:
            return
        with contextlib.suppress(OSError):  # it may be gone
            fd = self._disk.open(path)
            try:
                self._disk.forget(fd)
            finally:
                self._disk.close(fd)


class Trail:
    """Follows one writer, one job at a time: each takes all that has come since the one before."""

    def __init__(self, behind: Behind, file: HeldFile, keep: bool) -> None:
        self._behind = behind
        self._file = file
        self._keep = keep
        self._moved = 0
        self._job: Future[None] | None = None

    def written(self, end: int) -> None:
        """Follow up to ``end``, if that is far and the medium has kept up so far."""
        if end - self._moved >= PIECE_BYTES and (self._job is None or self._job.done()):
            self._submit(end, last=False)

    def ended(self, end: int) -> None:
        """Follow to the end of the file. What keeps it a little longer is only a reader."""
        if self._job is not None:
            self._submit(end, last=True)

    def _submit(self, end: int, *, last: bool) -> None:
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._job = self._behind.submit(
                self._file, self._moved, end, last=last, keep=self._keep
            )
            self._moved = end
